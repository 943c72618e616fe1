"""Documents -> rows: the ids of all documents form one stream, and rows are put together from pieces of it.

Shapes: B rows, T positions in a row, U = T + 1, P pieces of all rows, Q these and a piece of padding after each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from lm.data.column import Column, SortedColumn
from lm.nn.source import Source


class Batch(NamedTuple):
    """Rows of packed text, as `cut_pieces` explains them: int32, the weights float32.

    A JAX pytree of NumPy arrays on the host and of jax.Array on the devices.
    """

    tokens_BT: Any
    targets_BT: Any
    weights_BT: Any
    segments_BT: Any
    positions_BT: Any
    source: Source | None = None
    """Of pairs, what an encoder reads; their targets are then the rows themselves."""


def arrays_of(batch: Batch) -> list[Any]:
    """The arrays of a batch, those of its source last; `of_arrays` makes the batch of them again."""
    return [*batch[:-1], *(batch.source or ())]


def of_arrays(arrays: Sequence[Any]) -> Batch:
    fields = len(Batch._fields) - 1
    source = Source(*arrays[fields:]) if len(arrays) > fields else None
    return Batch._make((*arrays[:fields], source))


class Store(Protocol):
    """What packing needs of a token store, whose members these are."""

    @property
    def source(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def offsets(self) -> SortedColumn: ...

    @property
    def prompts(self) -> Column | None: ...

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray: ...


class Pieces(NamedTuple):
    """What rows are made of, row after row and in each from left to right. A piece lies in one document.

    Only a row's last piece may end before its document does: then its last target is the id after it.
    """

    rows_P: np.ndarray
    """The row that a piece is in, ascending; each row has one at least."""
    starts_P: np.ndarray
    """int64, where a piece begins in the store."""
    lengths_P: np.ndarray
    """How many ids it has: one at least."""
    prompts_P: np.ndarray
    """How many of its targets, the first ones, have weight 0."""
    ends_P: np.ndarray
    """Whether its last id is its document's last."""


def cut_pieces(store: Store, pieces: Pieces, *, rows: int, context: int) -> Batch:
    """The rows that pieces make, padded to `context`.

    Segments number a row's pieces from 1 (0 is padding), positions count from 0 in each. A target is the next id of the
    same document, wherever that lies, with weight 1; on a document's last id, before an id of a prompt that isn't
    trained on, and on padding target and weight are 0.
    """
    firsts_B = np.searchsorted(pieces.rows_P, np.arange(rows))
    padding_B = context - np.add.reduceat(pieces.lengths_P, firsts_B)
    assert padding_B.min() >= 0, "a row is longer than the context"
    numbers_P = np.arange(1, len(pieces.rows_P) + 1) - firsts_B[pieces.rows_P]
    ends_P = pieces.ends_P.astype(np.int64)
    silent_P = np.minimum(pieces.prompts_P, pieces.lengths_P - ends_P)
    # Padding is one more piece of every row, of any length: then the lengths add up to rows x context.
    none_B = np.zeros_like(padding_B)
    lengths_Q, numbers_Q, silent_Q, ends_Q = np.insert(
        np.stack([pieces.lengths_P, numbers_P, silent_P, ends_P]),
        np.append(firsts_B[1:], len(pieces.rows_P)),
        np.stack([padding_B, none_B, padding_B, none_B]),
        axis=1,
    )
    segments_BT = np.repeat(numbers_Q.astype(np.int32), lengths_Q).reshape(rows, context)
    begins_Q = (np.cumsum(lengths_Q) - lengths_Q).astype(np.int32)
    positions_BT = (np.arange(rows * context, dtype=np.int32) - np.repeat(begins_Q, lengths_Q)).reshape(rows, context)
    runs_Q3 = np.stack([silent_Q, lengths_Q - silent_Q - ends_Q, ends_Q], axis=1)  # of weight 0, 1 and 0 again
    counted_BT = np.repeat(np.tile([False, True, False], len(runs_Q3)), runs_Q3.ravel()).reshape(rows, context)

    ids_BU = np.zeros((rows, context + 1), np.int32)  # with the id after each row, the last target
    _read_ids(store, pieces, begins_Q[np.arange(len(pieces.rows_P)) + pieces.rows_P] + pieces.rows_P, ids_BU)
    tokens_BT = np.ascontiguousarray(ids_BU[:, :-1])
    targets_BT = ids_BU[:, 1:] * counted_BT
    for row in np.flatnonzero(padding_B).tolist():
        padding = slice(context - padding_B[row], None)
        tokens_BT[row, padding] = positions_BT[row, padding] = 0
    return Batch(tokens_BT, targets_BT, counted_BT.astype(np.float32), segments_BT, positions_BT)


def _read_ids(store: Store, pieces: Pieces, places_P: np.ndarray, ids_BU: np.ndarray) -> None:
    """Reads each piece to its place in `ids_BU`, pieces that follow one another in the stream at once."""
    stops_P = pieces.starts_P + pieces.lengths_P
    apart_P = np.ones(len(stops_P) + 1, bool)
    apart_P[1:-1] = (pieces.starts_P[1:] != stops_P[:-1]) | (pieces.rows_P[1:] != pieces.rows_P[:-1])
    firsts, lasts = np.flatnonzero(apart_P[:-1]), np.flatnonzero(apart_P[1:])
    starts = pieces.starts_P[firsts].tolist()
    stops = (stops_P + ~pieces.ends_P)[lasts].tolist()
    flat = ids_BU.reshape(-1)
    for start, stop, place in zip(starts, stops, places_P[firsts].tolist(), strict=True):
        flat[place : place + stop - start] = store.read(start, stop)
