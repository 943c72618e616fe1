"""A SentencePiece .model, run by the `sentencepiece` library, which is an extra."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm.config import InputError
from lm.data.tokenizers.base import Tokenizer
from lm.data.tokenizers.special_ids import SpecialIds
from lm.data.tokenizers.surfaces import bytes_of_spans

FILE_NAME = "tokenizer.model"
_NO_PIECE = b"<no such piece>"
"""What BOS, EOS or padding is called where there is none: an empty name would mean the library's own."""


class SentencePieceTokenizer(Tokenizer):
    """Ids as the model gives them, without BOS and EOS. Not lossless: it puts a space in front, as most models say."""

    kind = "file"
    file_name = FILE_NAME
    lossless = False
    cuts = None

    def __init__(self, content: bytes, path: Path | str = FILE_NAME):
        try:
            import sentencepiece
        except ImportError as error:
            raise InputError(f"{path} needs the sentencepiece library: pip install 'lm[sentencepiece]'") from error
        self.content = content
        self.library_version = f"sentencepiece {sentencepiece.__version__}"
        self._library = sentencepiece.SentencePieceProcessor()
        try:
            self._library.LoadFromSerializedProto(content)
        except (RuntimeError, ValueError) as error:  # what the library makes of its own error codes
            raise InputError(f"{path} is not a SentencePiece model that the library reads: {error}") from error
        self.vocab_size = self._library.get_piece_size()
        roles = (self._library.bos_id(), self._library.eos_id(), self._library.pad_id())
        self.bos, self.eos, self.pad = (None if number < 0 else number for number in roles)

    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePieceTokenizer, (self.content,)

    def encode(self, text: str) -> np.ndarray:
        return self._library.encode(text, return_type="numpy")

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        threads = 1 if os.environ.get("TOKENIZERS_PARALLELISM") == "false" else -1  # as for the other library
        return self._library.encode(list(texts), return_type="numpy", num_threads=threads)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids)
        return self._library.decode(ids[ids < self.vocab_size].tolist())

    def bytes_per_token(self, text: str) -> np.ndarray:
        found = self._library.encode(text, return_type="offset_mapping", return_bytes=True)
        spans = np.array(found["offsets"], np.int64).reshape(-1, 2)
        own = spans[:, 1] - spans[:, 0]
        # the last byte of a character has the whole span, those before it an empty one
        byte = np.array([self._library.is_byte(number) for number in found["ids"]], bool)
        for index in np.flatnonzero(byte & (own == 0))[::-1]:
            spans[index] = spans[index + 1]
        return bytes_of_spans(spans, np.where(byte, 1, own), len(text.encode()))

    def find(self, token: str) -> int | None:
        """The id of a control token; None where it is none. Other pieces are made of text, so they can't be special."""
        number = self._library.piece_to_id(token)
        return number if self._library.is_control(number) else None

    def with_special_ids(self, ids: SpecialIds) -> SentencePieceTokenizer:
        """The same model with BOS, EOS and padding as said, which its file then says too.

        A protocol buffer takes the last of values given twice, so the names are put behind the file: in trainer_spec
        (field 2), bos_piece, eos_piece and pad_piece (46, 47, 48 in sentencepiece_model.proto).
        """
        if ids == (self.bos, self.eos, self.pad):
            return self
        spec = b""
        for field, number in zip((46, 47, 48), ids, strict=True):
            name = _NO_PIECE if number is None else self._library.id_to_piece(number).encode()
            spec += _varint(field << 3 | 2) + _varint(len(name)) + name
        return SentencePieceTokenizer(self.content + _varint(2 << 3 | 2) + _varint(len(spec)) + spec)


def _varint(value: int) -> bytes:
    low = b""
    while value > 0x7F:
        low += bytes([value & 0x7F | 0x80])
        value >>= 7
    return low + bytes([value])
