"""A document: a text and the name it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

MAX_DOCUMENT_BYTES = 2**28
"""A longer document, or line of a file, is refused: it would have to lie in memory whole."""


class Document(NamedTuple):
    """`prompt + text` is the document; the prompt is context: of a pair the first side and the separator."""

    id: str
    text: str
    prompt: str = ""


def of_sides(name: str, sides: Sequence[str], pair_separator: str) -> Document:
    """The document of one text, or of the two sides of a pair. A pair of two empty sides is an empty document."""
    if len(sides) == 1:
        return Document(name, sides[0])
    first, second = sides
    return Document(name, second, first + pair_separator if first or second else "")
