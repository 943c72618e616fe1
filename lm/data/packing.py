"""Documents -> rows: the ids of all documents form one stream, and rows are cut from it.

Shapes: B rows, T positions in a row. The stream is circular, so that an epoch may begin anywhere in it. `offsets` holds
where each document starts in the stream and, last, the stream's length.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Rows of packed text, as `cut_rows` explains them: int32, the weights float32.

    A JAX pytree of NumPy arrays on the host and of jax.Array on the devices.
    """

    tokens_BT: Any
    targets_BT: Any
    weights_BT: Any
    segments_BT: Any
    positions_BT: Any


def cut_rows(
    ids: np.ndarray, offsets: np.ndarray, starts_B: np.ndarray, lengths_B: np.ndarray, *, context: int
) -> Batch:
    """Cuts the rows that begin at `starts_B` in the circular stream and take `lengths_B` ids, padded to `context`.

    A row falls into pieces, one a document it touches. Segments number them from 1 (0 is padding), positions count
    from 0 in each. A target is the next id of the same document, wherever that lies, with weight 1; on a document's
    last id and on padding target and weight are 0. Rows that together cover the stream once hold every id as an input
    once, and every id but each document's first as a target once.

    Raises:
        ValueError: a row longer than the context or than the stream would repeat ids.
    """
    if lengths_B.size and lengths_B.max() > min(context, len(ids)):
        raise ValueError(f"a row of {lengths_B.max()} ids: at most the context {context} and the stream {len(ids)}")
    tokens_BT, targets_BT = _gather(ids, starts_B, lengths_B, context)
    first_BT, last_BT = _document_edges(offsets, starts_B, context)
    column_T = np.arange(context, dtype=np.int32)
    filled_BT = column_T < lengths_B[:, None]
    first_BT[:, 0] = True  # a row's first id begins a piece, even in the middle of a document
    positions_BT = column_T - np.maximum.accumulate(np.where(first_BT, column_T, 0), axis=1)
    weights_BT = filled_BT & ~last_BT
    return Batch(
        tokens_BT,
        targets_BT * weights_BT,
        weights_BT.astype(np.float32),
        np.cumsum(first_BT, axis=1, dtype=np.int32) * filled_BT,
        positions_BT * filled_BT,
    )


def _gather(
    ids: np.ndarray, starts_B: np.ndarray, lengths_B: np.ndarray, context: int
) -> tuple[np.ndarray, np.ndarray]:
    """The ids of each row, 0 on padding, and the ids one further."""
    tokens_BT = np.zeros((len(starts_B), context), np.int32)
    targets_BT = np.zeros((len(starts_B), context), np.int32)
    for row, (start, length) in enumerate(zip(starts_B.tolist(), lengths_B.tolist(), strict=True)):
        # Slices: several times faster than fancy indexing, and a memory map reads each page once.
        run = ids[start : start + length + 1]
        if len(run) <= length:
            run = np.concatenate([run, ids[: length + 1 - len(run)]])
        tokens_BT[row, :length] = run[:-1]
        targets_BT[row, :length] = run[1:]
    return tokens_BT, targets_BT


def _document_edges(offsets: np.ndarray, starts_B: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Where a document's first and last id lie in each row of the circular stream, as two boolean [B, T]."""
    size = int(offsets[-1])
    edges_BT = np.zeros((len(starts_B), context + 1), bool)
    # Edges in start .. start + context; those of a row that runs over the end of the stream are found from its start.
    for shift in (0, size) if (starts_B + context >= size).any() else (0,):
        low_B = np.searchsorted(offsets, starts_B - shift, side="left")
        high_B = np.searchsorted(offsets, starts_B - shift + context, side="right")
        counts_B = high_B - low_B
        rows = np.repeat(np.arange(len(starts_B)), counts_B)
        before = np.repeat(np.cumsum(counts_B) - counts_B, counts_B)
        found = offsets[np.arange(len(rows)) - before + low_B[rows]]
        edges_BT[rows, found - (starts_B[rows] - shift)] = True
    return edges_BT[:, :-1], edges_BT[:, 1:].copy()
