"""Text <-> token ids: bytes, a byte-level BPE trained on the corpus, or any `tokenizer.json` of Hugging Face's library.

All three are kept as a `tokenizer.json`, so that what we save opens in `tokenizers` with the same ids.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lm.config import InputError, TokenizerConfig
from lm.data import cache
from lm.data.corpus import Corpus

FILE_NAME = "tokenizer.json"
BOS, EOS = "<|bos|>", "<|eos|>"
"""The special tokens of our own tokenizers: their last two ids."""
KNOWN_BOS = (BOS, "<s>", "<bos>", "<BOS>", "[BOS]", "<|begin_of_text|>", "<|startoftext|>", "<|begin_of_sentence|>")
KNOWN_EOS = (EOS, "</s>", "<eos>", "<EOS>", "[EOS]", "<|end_of_text|>", "<|endoftext|>", "<|end_of_sentence|>")
"""How special tokens are known in a file, which doesn't say what they are for; the first that it has."""

PIECES = r"[^\s\w]*\s*\n[ \t]*| ?[^\s\w]* ?\w+| ?[^\s\w]+|\s+"
"""What merges stay within: a line's last punctuation with its end and the next line's indent; a word with what is
written before it, as in ` self`, `.append` and `("name`; punctuation; other space. On Python source and at 4096 tokens
this makes 9 % fewer tokens than GPT-2's pattern."""


class Tokenizer(ABC):
    """What every tokenizer does. Encoding adds no special ids, and never makes one of text that looks like it."""

    kind: str
    vocab_size: int
    bos: int | None
    eos: int | None

    def __init__(self, file_content: str):
        self.file_content = file_content

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int32."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids: special ones are left out, bytes that aren't UTF-8 become U+FFFD."""

    @abstractmethod
    def bytes_per_token(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """The UTF-8 bytes that each id stands for, int32; those of a whole encoded text add up to its length."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, over all cores."""
        return [self.encode(text) for text in texts]

    @property
    def first_id(self) -> int | None:
        """What stands before a text that is scored or continued: BOS, else EOS, else nothing."""
        return self.eos if self.bos is None else self.bos

    @cached_property
    def sha256(self) -> str:
        """Of the tokenizer's file."""
        return hashlib.sha256(self.file_content.encode()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the tokenizer's file, in one step: at `path`, or as `tokenizer.json` where that is a directory."""
        target = Path(path)
        if target.is_dir():
            target = target / FILE_NAME
        scratch = target.with_name(f".{target.name}-{os.getpid()}")
        scratch.write_bytes(self.file_content.encode())
        return scratch.replace(target)


class ByteTokenizer(Tokenizer):
    """Ids 0..255 are the bytes, then BOS and EOS."""

    kind = "bytes"
    vocab_size, bos, eos = 258, 256, 257

    def __init__(self) -> None:
        super().__init__(_byte_file())

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", "replace")

    def bytes_per_token(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        return (np.asarray(ids) < 256).astype(np.int32)


class FileTokenizer(Tokenizer):
    """A `tokenizer.json`, run by the `tokenizers` library."""

    def __init__(self, file_content: str, *, kind: str = "file"):
        super().__init__(file_content)
        self.kind = kind
        self._tokenizer = tokenizers.Tokenizer.from_str(file_content)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # "<|eos|>" in a text is text
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token.content: number for number, token in added.items() if token.special}
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.bos = next((self._special[name] for name in KNOWN_BOS if name in self._special), None)
        self.eos = next((self._special[name] for name in KNOWN_EOS if name in self._special), None)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=True)

    def bytes_per_token(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = np.asarray(ids)
        sizes = self._sizes[ids]
        if self._adds_space and len(ids):
            # The library puts a space before the text, which the text's first token then carries.
            first = int(np.argmax(sizes > 0))
            sizes[first] -= min(1, sizes[first])
        return sizes

    @cached_property
    def _sizes(self) -> np.ndarray:
        """UTF-8 bytes of every id."""
        described = json.loads(self.file_content)
        byte_level = '"ByteLevel"' in json.dumps([described.get("pre_tokenizer"), described.get("decoder")])
        added = self._tokenizer.get_added_tokens_decoder()
        sizes = np.zeros(self.vocab_size, np.int32)
        for token, number in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if number in added:
                sizes[number] = 0 if added[number].special else len(token.encode())
            elif byte_level:
                sizes[number] = len(token)  # a character of the token is a byte of the text
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                sizes[number] = 1
            else:
                sizes[number] = len(token.replace("\u2581", " ").encode())
        return sizes

    @cached_property
    def _adds_space(self) -> bool:
        described = json.loads(self.file_content)
        parts = json.dumps([described.get("normalizer"), described.get("pre_tokenizer")])
        marks = ('"Prepend"', '"prepend_scheme": "always"', '"prepend_scheme": "first"', '"add_prefix_space": true')
        return any(mark in parts for mark in marks)


def load(path: str | os.PathLike[str]) -> Tokenizer:
    """Opens a `tokenizer.json`, or the one in a directory. Raises InputError where there is none that can be read."""
    file = Path(path)
    if file.is_dir():
        file = file / FILE_NAME
    if not file.is_file():
        raise InputError(f"there is no tokenizer at {file}: give the path of a {FILE_NAME} or of its folder")
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not a {FILE_NAME}: not UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise InputError(f"{file} can't be read: {error.strerror}") from error
    if content == _byte_file():
        return ByteTokenizer()
    try:
        return FileTokenizer(content)
    except Exception as error:  # the library raises no narrower type
        raise InputError(f"{file} is not a {FILE_NAME} that the tokenizers library reads: {error}") from error


def build(config: TokenizerConfig, corpus: Corpus) -> Tokenizer:
    """The tokenizer that a config asks for. A BPE is trained on the corpus once and then taken from the cache."""
    if config.kind == "bytes":
        return ByteTokenizer()
    if config.kind == "file":
        assert config.path is not None, "checked by lm.validation"
        return load(config.path)
    recipe = json.dumps([corpus.fingerprint, config.vocab_size, tokenizers.__version__, PIECES])
    folder = cache.directory("tokenizers", hashlib.sha256(recipe.encode()).hexdigest()[:32])
    if not (folder / FILE_NAME).exists():
        train_bpe((document.text for document in corpus), config.vocab_size).save(folder)
    return FileTokenizer((folder / FILE_NAME).read_text(encoding="utf-8"), kind="bpe")


def train_bpe(texts: Iterable[str], vocab_size: int) -> FileTokenizer:
    """Trains a byte-level BPE: any text comes back exactly from its ids. In order: the bytes, the merges, BOS, EOS."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 2, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([BOS, EOS])
    return FileTokenizer(tokenizer.to_str(), kind="bpe")


def _byte_file() -> str:
    """The byte tokenizer as a BPE without merges, written out here so that no library version changes it."""
    letters = _byte_letters()
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 256, "content": BOS, **special}, {"id": 257, "content": EOS, **special}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {letter: byte for byte, letter in enumerate(letters)},
            "merges": [],
        },
    }
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def _byte_letters() -> list[str]:
    """How byte-level vocabularies write each byte: as itself where Latin-1 can print it, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]
