"""Ready ids -> a token store: finds where documents begin and end, and checks that the tokenizer can have made them.

The ids stay where they are; only those of a held-out split, which lie apart, are copied.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from lm.config import InputError
from lm.data.column import Column
from lm.data.sources import holdout
from lm.data.sources.token_files import TokenFile, TokenFiles
from lm.data.store import Journal, describe, id_dtype
from lm.data.tokenizer import Tokenizer

CHUNK = 2**22
"""Ids looked at together."""


class Marks(NamedTuple):
    """The id that stands between documents: before each, or after each. None: a file is a document."""

    id: int | None
    leading: bool


class Span(NamedTuple):
    """A document: ids start..stop of a file."""

    name: str
    file: TokenFile
    start: int
    stop: int


def write(
    directory: Path,
    files: TokenFiles,
    tokenizer: Tokenizer,
    fingerprint: str,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Fills `directory` with the store of ready ids."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    marks = marks_of(files, tokenizer)
    journal = Journal(fingerprint)
    try:
        _write(directory, files, tokenizer, marks, journal, progress)
        if not journal.documents:
            raise InputError(f"{files.source} has no ids")
    except InputError:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    ends = (marks.id, tokenizer.eos if marks.id != tokenizer.eos else None) if marks.leading else (None, marks.id)
    describe(directory, journal, id_dtype(tokenizer), *ends, corpus_sha256=files.key, skipped=0)


def marks_of(files: TokenFiles, tokenizer: Tokenizer) -> Marks:
    """How these files mark documents: by the id that they begin with if that is BOS or EOS, else by EOS at their ends.

    nanoGPT puts EOS after each document, llm.c before each.
    """
    first = files.files[0]
    begins = int(Column(first.path, first.dtype, first.size, offset=first.offset)[0])
    if begins in (tokenizer.bos, tokenizer.eos):
        return Marks(begins, leading=True)
    return Marks(tokenizer.bos, leading=True) if tokenizer.eos is None else Marks(tokenizer.eos, leading=False)


def spans(
    files: TokenFiles, tokenizer: Tokenizer, marks: Marks, progress: Callable[[int, int], None] | None = None
) -> Iterator[Span]:
    """The documents of all files, in order. Raises InputError at an id that the tokenizer hasn't."""
    total, done = sum(file.size for file in files.files), 0
    for file in files.files:
        begin = number = 0
        ids = Column(file.path, file.dtype, file.size, offset=file.offset)
        for at in range(0, file.size, CHUNK):
            chunk = ids[at : at + CHUNK]
            _check(chunk, file, at, tokenizer)
            found = np.flatnonzero(chunk == marks.id) if marks.id is not None else np.array([], np.int64)
            for edge in (found + at + (not marks.leading)).tolist():
                if edge > begin:
                    yield Span(f"{file.name}#{number}", file, begin, edge)
                    begin, number = edge, number + 1
            if progress is not None:
                progress(done + at + len(chunk), total)
        if begin < file.size:
            yield Span(f"{file.name}#{number}", file, begin, file.size)
        done += file.size


def _check(chunk: np.ndarray, file: TokenFile, at: int, tokenizer: Tokenizer) -> None:
    for worst in (int(chunk.argmax()), int(chunk.argmin())):
        if not 0 <= chunk[worst] < tokenizer.vocab_size:
            raise InputError(
                f"{file.path}: id {chunk[worst]} at position {at + worst}, but the tokenizer ({tokenizer.kind}) has "
                f"{tokenizer.vocab_size} tokens: set tokenizer.kind to file, tokenizer.path to the one that made them"
            )


def _write(
    directory: Path,
    files: TokenFiles,
    tokenizer: Tokenizer,
    marks: Marks,
    journal: Journal,
    progress: Callable[[int, int], None] | None,
) -> None:
    found = spans(files, tokenizer, marks, progress)
    if files.split is not None:
        few = list(itertools.islice(spans(files, tokenizer, marks), holdout.FEW + 1))
        found = _half(found, few, validation=files.split == "validation")
    names_end = 0
    with (
        (directory / "offsets.bin").open("wb") as offsets,
        (directory / "names.bin").open("wb") as names,
        (directory / "name_ends.bin").open("wb") as name_ends,
        (directory / "ids.bin").open("wb") as copied,
    ):
        for span in found:
            name = span.name.encode()
            names_end += len(name)
            names.write(name)
            name_ends.write(np.int64(names_end).tobytes())
            offsets.write(np.int64(journal.tokens).tobytes())
            if files.split is not None:
                _copy(span, copied, id_dtype(tokenizer))
            journal.documents += 1
            journal.tokens += span.stop - span.start


def _half(found: Iterator[Span], few: list[Span], *, validation: bool) -> Iterator[Span]:
    """What the held-out rule leaves for one side; `few` are the first documents, all of them unless they are many."""
    if len(few) == 1:
        (whole,) = few
        middle = whole.start + (whole.stop - whole.start) * 9 // 10
        half = (middle, whole.stop) if validation else (whole.start, middle)
        yield Span(f"{whole.name}[{'validation' if validation else 'train'}]", whole.file, *half)
        return
    names = holdout.held_out([span.name for span in few]) if len(few) <= holdout.FEW else None
    for span in found:
        held = holdout.is_held_out(span.name) if names is None else span.name in names
        if held == validation:
            yield span


def _copy(span: Span, target: BinaryIO, dtype: np.dtype) -> None:
    ids = Column(span.file.path, span.file.dtype, span.file.size, offset=span.file.offset)
    for at in range(span.start, span.stop, CHUNK):
        target.write(ids[at : min(at + CHUNK, span.stop)].astype(dtype).tobytes())
