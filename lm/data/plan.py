"""Plans of rows: which pieces of the stream each row holds, worked out once and kept on disk.

Shapes: D documents, Q rests of documents in the order that they are packed in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from lm.config import InputError
from lm.data import bins, cache
from lm.data.column import Column
from lm.data.packing import Store

VERSION = 1
CHUNK = 2**18
"""Documents, or pieces, worked on at once."""
PIECE = np.dtype([("start", "<i8"), ("length", "<i4"), ("prompt", "<i4"), ("ends", "?")])
"""A piece as `packing.Pieces` has it."""


class Plan:
    """Rows of pieces. Each id of the store is in one of them."""

    def __init__(self, directory: Path):
        self._directory = directory
        try:
            described = json.loads((directory / "plan.json").read_text(encoding="utf-8"))
            self._rows, pieces = int(described["rows"]), int(described["pieces"])
            self._context, self._tokens = int(described["context"]), int(described["tokens"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged() from error
        self._firsts = Column(directory / "rows.bin", np.int64, self._rows + 1)
        self._pieces = Column(directory / "pieces.bin", PIECE, pieces)

    def __len__(self) -> int:
        return self._rows

    def pieces(self, rows_B: Sequence[int]) -> tuple[list[int], np.ndarray]:
        """How many pieces each of some rows has, and these, row after row. Raises InputError if they can't be right."""
        found = []
        for row in rows_B:
            first, last = self._firsts[row : row + 2].tolist()
            found.append(self._pieces[first:last] if 0 <= first <= last else self._pieces[:0])
        counts = [len(pieces) for pieces in found]
        every = np.concatenate(found)
        lengths = every["length"]
        if (
            min(counts) < 1
            or lengths.min() < 1
            or every["start"].min() < 0
            or (every["start"] + lengths).max() > self._tokens
            or max(int(pieces["length"].sum()) for pieces in found) > self._context
        ):
            raise self._damaged()
        return counts, every

    def _damaged(self) -> InputError:
        folder = self._directory
        return InputError(f"the plan of rows in {folder} is damaged: delete {folder} and start again, it is made anew")


def plan_of(store: Store, *, context: int, packing: str, say: Callable[[str], None] | None = None) -> Plan:
    """The plan of a store, from the cache or made now.

    A document of at most `context` ids is one piece. A longer one fills rows as long as more of it follows; its rest
    is packed like a document. With "padded", documents and rests have a row each. With "best_fit" they are packed by
    best-fit decreasing (Ding et al. 2024, arXiv:2404.10830): longest first, each into the row with the least space
    that takes it. In memory: 8 bytes a document, 12 where documents have prompts.

    Args:
        say: told when a plan has to be made.
    """
    recipe = json.dumps([VERSION, store.fingerprint, context, packing])
    directory = cache.directory("plans") / hashlib.sha256(recipe.encode()).hexdigest()[:32]
    if not directory.exists():
        if say is not None:
            say(f"packing    {len(store):,} documents into rows of {context:,} tokens, once")
        try:
            with cache.building(directory) as scratch:
                (_best_fit if packing == "best_fit" else _padded)(scratch, store, context)
        except OSError as error:
            raise InputError(
                f"the plan of rows of {store.source} can't be written under {directory.parent}: {error.strerror}; make "
                "room, or set LM_CACHE to another folder"
            ) from error
    return Plan(directory)


class _Documents(NamedTuple):
    """Documents that aren't empty, as full rows that go on and rests of 1 ... context ids."""

    starts_D: np.ndarray
    """In the stream; int64."""
    full_D: np.ndarray
    """Full rows of each."""
    rests_D: np.ndarray
    """Ids of each that come after them."""
    prompts_D: np.ndarray
    """Ids of each that are its prompt, which it begins with."""
    context: int

    def rests(self) -> np.ndarray:
        """PIECE, one a document."""
        return _pieces(self.starts_D, self.full_D * self.context, self.rests_D, self.prompts_D, ends=True)

    def full(self) -> Iterator[np.ndarray]:
        """PIECE, a row each; some at a time, for a single document may have millions."""
        stops_D = np.cumsum(self.full_D)
        for low in range(0, int(stops_D[-1]), CHUNK):
            rows_R = np.arange(low, min(low + CHUNK, stops_D[-1]))
            of_R = np.searchsorted(stops_D, rows_R, side="right")
            begins_R = (rows_R - (stops_D - self.full_D)[of_R]) * self.context
            yield _pieces(self.starts_D[of_R], begins_R, self.context, self.prompts_D[of_R], ends=False)


def _documents(store: Store, context: int) -> Iterator[_Documents]:
    for low in range(0, len(store), CHUNK):
        offsets = store.offsets[low : low + CHUNK + 1]
        some_D = np.flatnonzero(np.diff(offsets))
        if len(some_D):
            sizes_D = offsets[some_D + 1] - offsets[some_D]
            full_D = (sizes_D - 1) // context
            prompts_D = np.zeros(len(some_D), np.int32)
            if store.prompts is not None:
                prompts_D = store.prompts[low : low + CHUNK][some_D]
            yield _Documents(offsets[some_D], full_D, sizes_D - full_D * context, prompts_D, context)


def _pieces(
    starts: np.ndarray, begins: np.ndarray, lengths: np.ndarray | int, prompts: np.ndarray, *, ends: bool
) -> np.ndarray:
    """Pieces that begin `begins` ids after their documents' `starts`; documents' first `prompts` ids are prompts."""
    pieces = np.empty(len(starts), PIECE)
    pieces["start"] = starts + begins
    pieces["length"] = lengths
    pieces["prompt"] = np.clip(prompts - 1 - begins, 0, lengths)  # the first target is the piece's second id
    pieces["ends"] = ends
    return pieces


def _padded(directory: Path, store: Store, context: int) -> None:
    with _Writer(directory, store, context) as writer:
        for documents in _documents(store, context):
            for full in documents.full():
                writer.rows_of_one(full)
            writer.rows_of_one(documents.rests())


def _best_fit(directory: Path, store: Store, context: int) -> None:
    counts = np.zeros(context + 1, np.int64)
    for documents in _documents(store, context):
        counts += np.bincount(documents.rests_D, minlength=context + 1)
    firsts = np.cumsum(counts[::-1])[::-1] - counts  # in Q, where the longest come first
    starts_Q = np.empty(counts.sum(), np.int64)
    prompts_Q = None if store.prompts is None else np.empty(len(starts_Q), np.int32)
    with _Writer(directory, store, context) as writer:
        next_places = firsts.copy()
        for documents in _documents(store, context):
            for full in documents.full():
                writer.rows_of_one(full)
            rests = documents.rests()
            # A counting sort, a chunk at a time. 16 bits, where they do: NumPy sorts those by radix, ten times faster.
            lengths = documents.rests_D.astype(np.min_scalar_type(context))
            order = np.argsort(lengths, kind="stable")
            here = np.bincount(lengths, minlength=context + 1)
            places = np.arange(len(order)) + np.repeat(next_places - (np.cumsum(here) - here), here)
            next_places += here
            starts_Q[places] = rests["start"][order]
            if prompts_Q is not None:
                prompts_Q[places] = rests["prompt"][order]
        for alike in bins.best_fit_decreasing(counts, context):
            for low in range(0, alike.bins, step := max(1, CHUNK // alike.items)):
                writer.rows_alike(_rows(alike, low, min(low + step, alike.bins), firsts, starts_Q, prompts_Q))


def _rows(
    alike: bins.Alike, low: int, high: int, firsts: np.ndarray, starts_Q: np.ndarray, prompts_Q: np.ndarray | None
) -> np.ndarray:
    """PIECE [high - low, pieces a row], of the bins low ... high."""
    pieces = np.zeros((high - low, alike.items), PIECE)
    pieces["ends"] = True
    column = 0
    for length, each, first in alike.contents:
        run = slice(firsts[length] + first + low * each, firsts[length] + first + high * each)
        columns = slice(column, column + each)
        pieces["start"][:, columns] = starts_Q[run].reshape(-1, each)
        pieces["length"][:, columns] = length
        if prompts_Q is not None:
            pieces["prompt"][:, columns] = prompts_Q[run].reshape(-1, each)
        column += each
    return pieces


class _Writer:
    """Writes rows and, on a clean exit, how many they are."""

    def __init__(self, directory: Path, store: Store, context: int):
        self._directory, self._tokens, self._context = directory, store.num_tokens, context
        self._rows, self._pieces = 0, 0

    def __enter__(self) -> _Writer:
        self._rows_file = (self._directory / "rows.bin").open("wb")
        self._pieces_file = (self._directory / "pieces.bin").open("wb")
        return self

    def rows_of_one(self, pieces: np.ndarray) -> None:
        """Rows of a piece each."""
        self.rows_alike(pieces[:, None])

    def rows_alike(self, pieces: np.ndarray) -> None:
        """Rows of as many pieces each: PIECE [rows, pieces a row]."""
        self._rows_file.write((self._pieces + np.arange(len(pieces)) * pieces.shape[1]).astype(np.int64).tobytes())
        self._pieces_file.write(pieces.tobytes())
        self._rows += len(pieces)
        self._pieces += pieces.size

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._rows_file.write(np.int64(self._pieces).tobytes())
        self._rows_file.close()
        self._pieces_file.close()
        if kind is None:
            described = {
                "rows": self._rows,
                "pieces": self._pieces,
                "context": self._context,
                "tokens": self._tokens,
            }
            (self._directory / "plan.json").write_text(json.dumps(described), encoding="utf-8")
