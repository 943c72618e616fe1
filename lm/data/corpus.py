"""Where documents come from: a source of text, with its split, as a stream of documents with stable ids and order.

How sources are written, `lm.data.sources.source` says. `SOURCE[train]` and `SOURCE[validation]` are the two corpora
that `open_splits(SOURCE, None)` gives; other splits and slices are TFDS's own, as in
`tfds:ag_news_subset[test[:10%]]`. Without a split, text in files is all the text, and a dataset its train split.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

from lm.config import InputError
from lm.data.sources import holdout, token_files
from lm.data.sources.document import MAX_DOCUMENT_BYTES, Document
from lm.data.sources.holdout import Half
from lm.data.sources.reader import Reader, Reading
from lm.data.sources.source import Source, parse, parse_named
from lm.data.sources.token_files import TokenFiles

READERS = {
    "builtin": "stdlib.reader",
    "tfds": "dataset.reader",
    "text": "text.reader",
    "jsonl": "jsonl.reader",
    "parquet": "parquet.reader",
    "tsv": "pairs.tsv",
    "lines": "pairs.lines",
}
"""What in lm.data.sources makes the reader of a kind. Named, not imported: TFDS and pyarrow take half a second,
of no use to text files."""
KEY_VERSION = 2
"""Counts changes of what is read from the same files."""
OWN_VALIDATION = ("validation", "valid", "val", "dev", "test")
"""Splits of a dataset that serve as validation, best first."""


class Corpus:
    """Documents in a stable order, streamed. Those with neither text nor prompt are left out.

    Attributes:
        source: opens the same corpus again.
        skipped: how many documents the last whole scan has left out; 0 before.
    """

    def __init__(self, source: str, reader: Reader, half: Half | None = None):
        self.source, self._reader, self._half = source, reader, half
        self.skipped = 0

    def __iter__(self) -> Iterator[Document]:
        return (document for document, _ in self.scan())

    def scan(self) -> Iterator[tuple[Document, int]]:
        """The documents in order, each with the bytes of `size` gone through so far.

        Raises:
            InputError: what can't be read, a document that is too long, or at the end no document at all.
        """
        found = skipped = 0
        for document, position in self._reader.scan():
            if len(document.text) + len(document.prompt) > MAX_DOCUMENT_BYTES:
                raise InputError(f"{document.id} in {self.source} has more than {MAX_DOCUMENT_BYTES} bytes: split it")
            mine = document if self._half is None else self._half.of(document)
            if mine is None:
                continue
            if mine.text or mine.prompt:
                found += 1
                yield mine, position
            else:
                skipped += 1
        if not found:
            use = "documents" if self._half is None else f"to {'validate' if self._half.validation else 'train'} on"
            raise InputError(
                f"{self.source} has no{'thing' if self._half else ''} {use}"
                + (f": all its {skipped} documents are empty" if skipped else "")
                + ("" if self._half is None else ": use more text, or name a source in data.validation")
            )
        self.skipped = skipped

    @cached_property
    def size(self) -> int:
        """Bytes on disk that a scan goes through, compressed as they lie."""
        return self._reader.size

    @cached_property
    def key(self) -> str:
        """SHA-256 over the contents of the files and how they are read, so that a changed file is a changed corpus."""
        return self._key_now()

    def changed(self) -> bool:
        """Whether a file has other contents by now than the key was made of."""
        return self._key_now() != self.key

    def _key_now(self) -> str:
        return sha256([KEY_VERSION, self._reader.contents(), self._half and self._half.described()])


class Concatenation(Corpus):
    """Several corpora one after another, ids with the number of theirs in front."""

    def __init__(self, source: str, corpora: Sequence[Corpus]):
        self.source, self._corpora = source, corpora
        self.skipped = 0

    def scan(self) -> Iterator[tuple[Document, int]]:
        before = 0
        for number, corpus in enumerate(self._corpora):
            for document, position in corpus.scan():
                yield document._replace(id=f"{number}:{document.id}"), before + position
            before += corpus.size
        self.skipped = sum(corpus.skipped for corpus in self._corpora)

    @cached_property
    def size(self) -> int:
        return sum(corpus.size for corpus in self._corpora)

    def _key_now(self) -> str:
        return sha256(["mix", [corpus._key_now() for corpus in self._corpora]])


class Component(NamedTuple):
    """One text of a mix, with its share of the training tokens, of any scale."""

    weight: float
    corpus: Corpus | TokenFiles


class Splits(NamedTuple):
    """What to train on and what to validate on, by name; "" is the name of a single one without."""

    train: tuple[Component, ...]
    validation: dict[str, Corpus | TokenFiles]


def open_corpus(
    source: str, *, document_separator: str | None = None, pair_separator: str = "\n"
) -> Corpus | TokenFiles:
    """The documents of a source, of a mix those of all its components one after another.

    Args:
        source: what to read, see `lm.data.sources.source`.
        document_separator: splits each text file into documents. None: one document a file.
        pair_separator: stands between the two sides of a pair.

    Raises:
        InputError: an unknown source or split, no matching file, or a dataset that isn't there and can't be prepared.
    """
    return _open(source, Reading(document_separator, pair_separator))


def open_splits(
    train: str,
    validation: str | Sequence[str] | None,
    *,
    document_separator: str | None = None,
    pair_separator: str = "\n",
) -> Splits:
    """The documents to train on and those to validate on.

    With no validation source: the dataset's own validation or test split; else a part held out of the training text,
    which training then doesn't see: the last tenth of a single document, by characters; of several documents those
    whose id hashes into a tenth; of pairs those whose first side does. Of a mix each component's, one after another.
    """
    reading = Reading(document_separator, pair_separator)
    parts = parse(train)
    if validation is not None and validation != ():
        components = [Component(part.weight, _open_one(part.source, reading)) for part in parts]
        return Splits(tuple(components), _open_named(validation, reading))
    halves = [_halves(part.source, reading) for part in parts]
    components = [Component(part.weight, half) for part, (half, _) in zip(parts, halves, strict=True)]
    weights = [part.weight for part in parts]
    return Splits(tuple(components), {"": _joined(train, weights, [half for _, half in halves])})


def open_validation(
    validation: str | Sequence[str], *, document_separator: str | None = None, pair_separator: str = "\n"
) -> dict[str, Corpus | TokenFiles]:
    """What `open_splits` gives to validate on, where sources for that are named."""
    return _open_named(validation, Reading(document_separator, pair_separator))


def _open(written: str, reading: Reading) -> Corpus | TokenFiles:
    parts = parse(written)
    opened = [_open_one(part.source, reading) for part in parts]
    return _joined(written, [part.weight for part in parts], opened)


def _open_named(validation: str | Sequence[str], reading: Reading) -> dict[str, Corpus | TokenFiles]:
    named = [parse_named(one) for one in ([validation] if isinstance(validation, str) else validation)]
    names = [name for name, _ in named]
    if len(named) > 1 and "" in names:
        raise InputError(f"data.validation: {dict(named)['']} has no name: of several, write each as NAME=SOURCE")
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"data.validation names {min(twice)!r} twice: give each its own name")
    try:
        return {name: _open(written, reading) for name, written in named}
    except InputError as error:  # a preset's, perhaps: its user has not typed it
        raise InputError(f"data.validation: {error}") from error


def _joined(written: str, weights: Sequence[float], parts: Sequence[Corpus | TokenFiles]) -> Corpus | TokenFiles:
    if len(parts) == 1:
        return parts[0]
    corpora = [part for part in parts if isinstance(part, Corpus)]
    if len(corpora) < len(parts):
        raise InputError(
            f"{written} mixes ready ids in, which make no one text with others: name each in data.validation, as in "
            f"a={parts[0].source} b={parts[1].source}, and give data.train the [train] of each"
        )
    # Without the + of 1e+16, which would part two components.
    shares = (str(weight).replace("+", "") for weight in weights)
    components = (f"{share}*{corpus.source}" for share, corpus in zip(shares, corpora, strict=True))
    return Concatenation("mix:" + "+".join(components), corpora)


def _open_one(one: Source, reading: Reading) -> Corpus | TokenFiles:
    if one.kind == "tokens":
        return token_files.find(one.base, one.place, one.split)
    if one.split in ("train", "validation"):
        return _halves(dataclasses.replace(one, split=None), reading)[one.split == "validation"]
    return Corpus(_with_split(one.base, one.split), _reader(one, reading))


def _halves(one: Source, reading: Reading) -> tuple[Corpus | TokenFiles, Corpus | TokenFiles]:
    """What to train on and what to validate on where nothing says the latter."""
    if one.kind == "tokens" and one.split in (None, "train"):
        train, validation = (token_files.find(one.base, one.place, split) for split in ("train", "validation"))
        return train, validation
    reader = None if one.kind == "tokens" else _reader(one, reading)
    if reader and (own := next((name for name in OWN_VALIDATION if name in reader.splits), None)):
        split = one.split or "train"
        if own in re.findall(r"[A-Za-z_]\w*", split):
            raise InputError(
                f"{_with_split(one.base, split)} would be both trained and validated on: "
                "name another source in data.validation"
            )
        own_split = reader.of_split(own)
        return Corpus(_with_split(one.base, split), reader), Corpus(_with_split(one.base, own), own_split)
    if reader is None or one.split not in (None, "train"):
        raise InputError(
            f"nothing says what to validate on beside {_with_split(one.base, one.split)}: "
            "name a source in data.validation"
        )
    return _hold_out(one.base, reader, reading.pair_separator)


def _hold_out(base: str, whole: Reader, pair_separator: str) -> tuple[Corpus, Corpus]:
    """Splits a corpus by `holdout`'s rule, after a look at its first documents."""
    documents = Corpus(base, whole)
    names: Iterable[str] = (holdout.name(document, pair_separator) for document in documents)
    if known := list(itertools.islice(whole.ids() or (), holdout.FEW + 1)):
        # Without reading them; but few may be empty, which only reading finds out.
        names = known if len(known) > holdout.FEW else names
    train, validation = holdout.halves(base, names, documents, pair_separator)
    return Corpus(f"{base}[train]", whole, train), Corpus(f"{base}[validation]", whole, validation)


def _reader(one: Source, reading: Reading) -> Reader:
    module, function = READERS[one.kind].split(".")
    return getattr(importlib.import_module(f"lm.data.sources.{module}"), function)(one, reading)


def _with_split(base: str, split: str | None) -> str:
    return f"{base}[{split}]" if split else base


def sha256(described: object) -> str:
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()
