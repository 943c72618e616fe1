"""Which part of a text is held out for validation when nothing says it: a fixed tenth."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Sequence

from lm.config import InputError
from lm.data.sources.document import Document

FEW = 1000
"""Among more documents than this some surely hash into the tenth and some don't: the hash alone decides."""


@dataclasses.dataclass(frozen=True)
class Half:
    """What the held-out rule leaves of a corpus, to train on or to validate on.

    Attributes:
        validation: which of the two.
        names: held out, of few documents; None: those whose name's hash says so.
        cut: there is one document, of which the last tenth is held out.
        pair_separator: ends the first side of a pair.
    """

    validation: bool
    names: frozenset[str] | None = None
    cut: bool = False
    pair_separator: str = ""

    def of(self, document: Document) -> Document | None:
        """The document, or the part of it that belongs to this half."""
        if self.cut:
            middle = cut(document.text)
            if self.validation:
                return Document(f"{document.id}[validation]", document.text[middle:])
            return Document(f"{document.id}[train]", document.text[:middle])
        held_name = name(document, self.pair_separator)
        held = is_held_out(held_name) if self.names is None else held_name in self.names
        return document if held == self.validation else None

    def described(self) -> list[object]:
        """As JSON, all that decides."""
        return [self.validation, None if self.names is None else sorted(self.names), self.cut]


def halves(source: str, names: Iterable[str], documents: Iterable[Document], pair_separator: str) -> tuple[Half, Half]:
    """What to train on and what to validate on, after a look at the first documents.

    Args:
        source: for messages.
        names: what the documents are held out by, in order.
        documents: the documents themselves.
    """
    first = list(itertools.islice(names, FEW + 1))
    held = None
    if len(first) == 1:
        _check_cut(source, next(iter(documents)))
    elif len(first) <= FEW:
        distinct = list(dict.fromkeys(first))
        if len(distinct) == 1:
            raise InputError(
                f"the {len(first)} pairs of {source} have the same first side, so none can be held out: "
                "name a source in data.validation"
            )
        held = held_out(distinct)
    cut_one = len(first) == 1
    return Half(False, held, cut_one, pair_separator), Half(True, held, cut_one, pair_separator)


def _check_cut(source: str, document: Document) -> None:
    if document.prompt:
        raise InputError(f"{source} is one pair, too little to hold out a part: name a source in data.validation")
    if not 0 < cut(document.text) < len(document.text):
        raise InputError(
            f"{source} is one document of {len(document.text)} characters, too short to hold out its last tenth: "
            "use more text, or name a source in data.validation"
        )


def name(document: Document, pair_separator: str) -> str:
    """What a document is held out by: its id, of a pair the first side: a sentence must not be in both halves."""
    return document.prompt.removesuffix(pair_separator) if document.prompt else document.id


def held_out(ids: Sequence[str]) -> frozenset[str]:
    """Of several documents those whose id hashes into a tenth, so that adding or reordering others moves none.

    Never empty and never all: among few documents the one with the smallest hash is held out, and the one with the
    largest is not.
    """
    assert len(ids) > 1, "one document is cut, not held out"
    ranked = sorted(ids, key=_hash)
    held = [name for name in ranked if is_held_out(name)]
    return frozenset((held or ranked[:1])[: len(ranked) - 1])


def is_held_out(name: str) -> bool:
    """The rule for one of many documents."""
    return _hash(name) * 10 < 2**256


def cut(text: str) -> int:
    """Of a single document the last tenth by characters: where it begins."""
    return len(text) * 9 // 10


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"held out {name}".encode()).digest())
