"""What every tokenizer does, whatever runs it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from lm.config import InputError

FILE_NAME = "tokenizer.json"


class Tokenizer(ABC):
    """Text <-> ids. Encoding adds no special ids, and never makes one of text that looks like it.

    Attributes:
        kind: as in TokenizerConfig.
        file_name: what its file is called in a folder.
        content: that file. It holds everything: what opens it alone has the same ids.
        bos, eos, pad: None where there is no such token.
        lossless: whether `decode(encode(text)) == text` for every text. True of bytes, of every BPE trained here and of
            byte-level files without a normalizer or prefix space (GPT-2, Llama 3, tiktoken); False where a file
            doesn't promise it (SentencePiece, WordPiece, normalizers).
        library_version: of what encodes, which may give other ids in another version; empty: our own code.
        cuts: ends of its matches, zero-width ones included, are places where a text may be cut and the parts encoded
            apart with the same ids. None: unknown.
    """

    kind: str
    file_name: str = FILE_NAME
    content: bytes
    vocab_size: int
    bos: int | None
    eos: int | None
    pad: int | None
    lossless: bool
    library_version: str = ""
    cuts: re.Pattern[str] | None

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int32."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids: special ones are left out, bytes that aren't UTF-8 become U+FFFD."""

    @abstractmethod
    def bytes_per_token(self, text: str) -> np.ndarray:
        """The UTF-8 bytes of the text that each of its ids stands for, int32 [len(encode(text))].

        They add up to len(text.encode()), unless the text has no ids at all. An id that stands for nothing of the text
        (a space that the tokenizer puts in front) has 0. What a normalizer drops counts for the token before it.
        """

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, over all cores."""
        return [self.encode(text) for text in texts]

    def split_at_cuts(self, text: str, size: int) -> list[str]:
        """The text in parts of `size` characters and what is left to the next cut: their ids, one part after another,
        are the text's. [text] where it can't be cut."""
        if self.cuts is None:
            return [text]
        parts, start = [], 0
        while len(text) - start > size and (found := self.cuts.search(text, start + size)):
            parts.append(text[start : found.end()])
            start = found.end()
        return [*parts, text[start:]] if start < len(text) or not parts else parts

    @property
    def first_id(self) -> int | None:
        """What stands before a text that is scored or continued: BOS, else EOS, else nothing."""
        return self.eos if self.bos is None else self.bos

    @cached_property
    def sha256(self) -> str:
        """Of the tokenizer's file."""
        return hashlib.sha256(self.content).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the tokenizer's file, in one step: at `path`, or under its own name where that is a directory."""
        target = Path(path)
        if target.is_dir():
            target = target / self.file_name
        scratch = target.with_name(f".{target.name}-{os.getpid()}")
        try:
            scratch.write_bytes(self.content)
            return scratch.replace(target)
        except OSError as error:
            with contextlib.suppress(OSError):
                scratch.unlink()
            raise InputError(f"the tokenizer can't be written to {target}: {error.strerror}") from error
