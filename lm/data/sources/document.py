"""A document: a text and the name it keeps; of a pair the second side, with the first in front of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lm.config import InputError

MAX_DOCUMENT_BYTES = 2**28
"""A longer document, or line of a file, is refused: it would have to lie in memory whole."""
Side = str | Sequence[str]
"""What a source gives for a text: the text itself, or a list of strings, as `of_sides` reads it."""


class Document(NamedTuple):
    """`prompt + text` is the document; the prompt is context: of a pair the first side and the separator."""

    id: str
    text: str
    prompt: str = ""
    others: tuple[str, ...] = ()
    """Other wordings of `text`, where the second side of a pair is a list of them: nothing is trained on these."""

    @property
    def references(self) -> tuple[str, ...]:
        """All wordings of the text, that which is trained on first."""
        return (self.text, *self.others)


def of_sides(name: str, sides: Sequence[Side], pair_separator: str, *, place: str) -> Document:
    """The document of one text, or of the two sides of a pair.

    A list of strings is one text, its strings with a space between them; but as the second side of a pair it is several
    wordings of one text, of which the first is trained on. A side without any text but white space is empty: a pair of
    two is an empty document.

    Args:
        place: where it stands, for the message.

    Raises InputError for a pair with an empty side.
    """
    first = _joined(sides[0])
    if len(sides) == 1:
        return Document(name, first)
    wordings = [sides[1]] if isinstance(sides[1], str) else [one for one in sides[1] if one.strip()] or [""]
    second, *others = wordings
    full = bool(first.strip()), bool(second.strip())
    if not any(full):
        return Document(name, "")
    if not all(full):
        empty = "first (source)" if full[1] else "second (target)"
        raise InputError(f"{place}: the {empty} side of the pair is empty: give it a text, or take out the pair")
    return Document(name, second, first + pair_separator, tuple(others))


def _joined(side: Side) -> str:
    return side if isinstance(side, str) else " ".join(side)
