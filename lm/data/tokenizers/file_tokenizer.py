"""A tokenizer.json of Hugging Face's library, run by that library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import tokenizers

from lm.config import InputError
from lm.data.tokenizers import split_patterns
from lm.data.tokenizers.base import Tokenizer
from lm.data.tokenizers.byte_tokenizer import byte_letters, special_token
from lm.data.tokenizers.special_ids import SpecialIds, by_name
from lm.data.tokenizers.surfaces import byte_offsets, bytes_of_spans

_OUR_KEY = "special_ids"
"""In the file's model, where the library skips what it doesn't know: the roles, where names tell them otherwise."""
_PART = 8192
"""Characters of a long text that are encoded as one, so that all cores have something to do."""
_BLOCK = 512
"""Parts that are encoded in one go: what the library says of each takes 100 times the memory of its ids."""


class FileTokenizer(Tokenizer):
    """A `tokenizer.json`, run by the `tokenizers` library."""

    library_version = f"tokenizers {tokenizers.__version__}"

    def __init__(self, content: str | bytes, kind: str = "file"):
        self.content = content.encode() if isinstance(content, str) else content
        self.kind = kind
        self._described: dict[str, Any] = json.loads(self.content)
        self._library = tokenizers.Tokenizer.from_str(self.content.decode())
        self._described.setdefault("added_tokens", [])
        added = self._library.get_added_tokens_decoder()
        self._special = {token.content: number for number, token in added.items() if token.special}
        self._vocabulary = self._library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocabulary.values(), default=-1) + 1
        if not self.vocab_size:
            raise InputError("its vocabulary is empty")
        named = by_name(self._special)._asdict()
        self.bos, self.eos, self.pad = SpecialIds(**{**named, **self._described["model"].get(_OUR_KEY, {})})
        for role, number in (("BOS", self.bos), ("EOS", self.eos), ("padding", self.pad)):
            if number is not None and not 0 <= number < self.vocab_size:
                raise InputError(f"its {role} id is {number}, and its vocabulary has {self.vocab_size} tokens")
        self.cuts = split_patterns.cuts(self._described)
        self._encoder = self._make_encoder()

    def __reduce__(self) -> tuple[Any, ...]:
        return FileTokenizer, (self.content, self.kind)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        parts = [self.split_at_cuts(text, _PART) for text in texts]
        flat = [part for split in parts for part in split]
        arrays: list[np.ndarray] = []
        for start in range(0, len(flat), _BLOCK):
            found = self._encoder.encode_batch_fast(flat[start : start + _BLOCK], add_special_tokens=False)
            arrays += [np.fromiter(encoding.ids, np.int32) for encoding in found]
        left = iter(arrays)
        return [next(left) if len(split) == 1 else np.concatenate([next(left) for _ in split]) for split in parts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._library.decode(np.asarray(ids).tolist(), skip_special_tokens=True)

    def bytes_per_token(self, text: str) -> np.ndarray:
        if self.lossless:
            return self._sizes[self.encode(text)]
        encoding = self._encoder.encode(text, add_special_tokens=False)
        starts = byte_offsets(text)
        spans = starts[np.array(encoding.offsets, np.int64).reshape(-1, 2)]
        return bytes_of_spans(spans, self._sizes[np.array(encoding.ids, np.int64)], int(starts[-1]))

    def find(self, token: str) -> int | None:
        """The id of a token as the file writes it; None where it has none."""
        return self._vocabulary.get(token)

    def with_special_ids(self, ids: SpecialIds) -> FileTokenizer:
        """The same tokenizer with BOS, EOS and padding as said, which its file then says too.

        Their tokens become special by it: never made of text, and left out in decoding.
        """
        if ids == (self.bos, self.eos, self.pad):
            return self
        described = json.loads(self.content)
        described["model"][_OUR_KEY] = ids._asdict()
        kept = [token for token in described.get("added_tokens", []) if token["id"] not in ids or token["special"]]
        new = {number for number in ids if number is not None} - {token["id"] for token in kept}
        kept += [special_token(number, token) for token, number in self._vocabulary.items() if number in new]
        described["added_tokens"] = sorted(kept, key=lambda token: token["id"])
        return FileTokenizer(json.dumps(described, ensure_ascii=False), self.kind)

    @cached_property
    def lossless(self) -> bool:  # type: ignore[override]
        described, model = self._described, self._described["model"]
        if described.get("normalizer") or any(not token["special"] for token in described["added_tokens"]):
            return False
        if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            return False
        parts = split_patterns.parts(described.get("pre_tokenizer"))
        if any(part["type"] not in ("Split", "Digits", "ByteLevel") for part in parts):
            return False
        if any(part.get("behavior") == "Removed" or part.get("add_prefix_space") for part in parts):
            return False
        decoder = described.get("decoder") or {"type": "none"}
        if [part["type"] for part in parts].count("ByteLevel") == 1:
            return decoder["type"] == "ByteLevel" and all(letter in model["vocab"] for letter in byte_letters())
        steps = [step["type"] for step in decoder.get("decoders", ())]
        whole = [f"<0x{byte:02X}>" for byte in range(256)]
        made = {"".join(merge) if isinstance(merge, list) else merge.replace(" ", "") for merge in model["merges"]}
        return (
            bool(model.get("byte_fallback"))
            and steps == ["ByteFallback", "Fuse"]
            and all(token in model["vocab"] and token not in made for token in whole)
        )

    @cached_property
    def _sizes(self) -> np.ndarray:
        """UTF-8 bytes that every id has by itself."""
        described = self._described
        byte_level = '"ByteLevel"' in json.dumps([described.get("pre_tokenizer"), described.get("decoder")])
        added = self._library.get_added_tokens_decoder()
        sizes = np.zeros(self.vocab_size, np.int32)
        for token, number in self._vocabulary.items():
            if number in added:
                sizes[number] = 0 if added[number].special else len(token.encode())
            elif byte_level:
                sizes[number] = len(token)  # a character of the token is a byte of the text
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                sizes[number] = 1
            else:
                sizes[number] = len((token if self.lossless else token.replace("\u2581", " ")).encode())
        return sizes

    def _make_encoder(self) -> tokenizers.Tokenizer:
        """The library's tokenizer as it encodes: nothing added, nothing cut off, nothing random, no special ids."""
        described = self._described
        changed = described["model"].get("dropout") is not None
        if changed:
            described["model"]["dropout"] = None
        encoder = self._library
        if self._hide_special() or changed:
            encoder = tokenizers.Tokenizer.from_str(json.dumps(described))
        encoder.no_padding()
        encoder.no_truncation()
        encoder.post_processor = None  # it would trim offsets
        encoder.encode_special_tokens = True  # "<|eos|>" in a text is text
        return encoder

    def _hide_special(self) -> bool:
        """Gives special tokens in the model's own vocabulary names that no text holds, where the model takes whole
        pieces for tokens: `encode_special_tokens` keeps the library, but not such a model, from making them of text."""
        model = self._described["model"]
        if model["type"] == "BPE" and not model.get("ignore_merges"):
            return False
        special, unknown = set(self._special.values()), model.get("unk_token")

        def renamed(piece: str, number: int) -> str:
            return f"\U0010ffff{number}\U0010ffff" if number in special and piece != unknown else piece

        before = model["vocab"]
        if isinstance(before, list):  # Unigram: [piece, score]
            model["vocab"] = [[renamed(piece, number), score] for number, (piece, score) in enumerate(before)]
        else:
            model["vocab"] = {renamed(piece, number): number for piece, number in before.items()}
        for token in self._described["added_tokens"]:
            token["content"] = renamed(token["content"], token["id"])
        return model["vocab"] != before
