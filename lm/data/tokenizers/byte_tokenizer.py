"""Bytes as ids."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.data.tokenizers.base import Tokenizer
from lm.data.tokenizers.special_ids import BOS, EOS


class ByteTokenizer(Tokenizer):
    """Ids 0..255 are the bytes, then BOS and EOS."""

    kind = "bytes"
    vocab_size, bos, eos, pad = 258, 256, 257, None
    lossless = True
    cuts = re.compile("")

    def __init__(self) -> None:
        self.content = byte_file()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", "replace")

    def bytes_per_token(self, text: str) -> np.ndarray:
        return np.ones(len(text.encode("utf-8")), np.int32)


def byte_file() -> bytes:
    """The byte tokenizer as a BPE without merges, written out here so that no library version changes it."""
    vocabulary = {letter: byte for byte, letter in enumerate(byte_letters())}
    added = [special_token(256, BOS), special_token(257, EOS)]
    content = byte_level_file(vocabulary, [], added, pre_tokenizer=byte_level(use_regex=False), ignore_merges=False)
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()


def byte_level_file(
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    added_tokens: list[dict[str, Any]],
    *,
    pre_tokenizer: dict[str, Any],
    ignore_merges: bool,
) -> dict[str, Any]:
    """A byte-level BPE as tokenizer.json says it. ignore_merges: a piece that is a token is taken whole."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": byte_level(use_regex=False),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def byte_level(*, use_regex: bool, add_prefix_space: bool = False) -> dict[str, Any]:
    """The part of tokenizer.json that makes letters of bytes, after splitting by GPT-2's pattern with `use_regex`."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def special_token(number: int, content: str) -> dict[str, Any]:
    """An entry of tokenizer.json's added_tokens."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": content, **flags}


def byte_letters() -> list[str]:
    """How byte-level vocabularies write each byte: as itself where Latin-1 can print it, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]
