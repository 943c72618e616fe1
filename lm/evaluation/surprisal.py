"""The surprisal of every token of a text, a JSON line a document.

Shapes: T tokens of a document.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any, TextIO

import numpy as np

from lm.data.corpus import Corpus, Document
from lm.data.sources.token_files import TokenFiles
from lm.data.tokenizer import Tokenizer
from lm.data.tokens import TokenStore
from lm.evaluation.scores import finite


class SurprisalWriter:
    """Writes {"id", "tokens", "pieces", "nats", "bytes"} of each document that it is called with, in their order.

    tokens are the document's ids, EOS included where it is scored, the BOS in front left out; nats is null where a
    token isn't scored. Where the text is known, pieces put together are the text: a character that several tokens
    share stands with the last of them, and bytes are the UTF-8 bytes that a token stands for. Of ready ids a piece is
    what the id alone decodes to, and bytes is null.
    """

    def __init__(self, file: TextIO, text: Corpus | TokenFiles, store: TokenStore, tokenizer: Tokenizer):
        self._file, self._store, self._tokenizer = file, store, tokenizer
        self._documents: Iterator[tuple[int, Document]] | None = enumerate(text) if isinstance(text, Corpus) else None

    def __call__(self, document: int, ids_T: np.ndarray, nats_T: np.ndarray) -> None:
        """ids_T and nats_T [T] of a document, its ids without BOS; NaN nats are not scored."""
        name = self._store.document_id(document)
        pieces, sizes = self._pieces(document, ids_T)
        record: dict[str, Any] = {
            "id": name,
            "tokens": ids_T.tolist(),
            "pieces": pieces,
            "nats": [finite(value) for value in nats_T.tolist()],
            "bytes": sizes,
        }
        self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")

    def _pieces(self, document: int, ids_T: np.ndarray) -> tuple[list[str], list[int] | None]:
        if self._documents is None:
            return [self._tokenizer.decode([token]) for token in ids_T.tolist()], None
        number, found = next(each for each in self._documents if each[0] == document)
        assert number == document
        parts = [part for part in (found.prompt, found.text) if part]
        sizes_T = np.concatenate([self._tokenizer.bytes_per_token(part) for part in parts])
        sizes_T = np.pad(sizes_T, (0, len(ids_T) - len(sizes_T)))  # EOS stands for no text
        return cut(found.prompt + found.text, sizes_T), sizes_T.tolist()


def cut(text: str, sizes_T: np.ndarray) -> list[str]:
    """A text in pieces of so many UTF-8 bytes each, a character being of the piece that its last byte is in."""
    widths = [len(character.encode()) for character in text]
    ends = np.concatenate([[0], np.cumsum(widths, dtype=np.int64)])  # where each character ends, in bytes
    # Characters that end within the first so many bytes.
    characters = np.searchsorted(ends, np.concatenate([[0], np.cumsum(sizes_T, dtype=np.int64)]), side="right") - 1
    return [text[begin:end] for begin, end in itertools.pairwise(characters.tolist())]
