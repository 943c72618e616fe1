"""Rows that are runs of the circular stream of all documents, begun and ended anywhere.

Shapes: B rows, P pieces of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lm.data.column import Column
from lm.data.packing import Batch, Pieces, Store, cut_pieces


def cut_runs(
    store: Store, starts_B: Sequence[int], lengths_B: Sequence[int], *, context: int, prompts: Column | None = None
) -> Batch:
    """The rows that begin at `starts_B` in the circular stream and take `lengths_B` ids, as `cut_pieces` explains them.

    Rows that together cover the stream once hold every id as an input once, and every id but each document's first as a
    target once.

    Args:
        prompts: how many ids of each document are a prompt, if that isn't trained on.
    """
    size = store.num_tokens
    assert max(lengths_B) <= size, "a row longer than the stream would repeat ids"
    runs = _Runs(store, prompts)
    for row, (start, length) in enumerate(zip(starts_B, lengths_B, strict=True)):
        runs.add(row, start, min(start + length, size))
        if start + length > size:
            runs.add(row, 0, start + length - size)
    return cut_pieces(store, runs.pieces(), rows=len(starts_B), context=context)


class _Runs:
    """Runs that don't go over the stream's end, and the pieces that documents' edges cut them into."""

    def __init__(self, store: Store, prompts: Column | None):
        self._store, self._prompts = store, prompts
        self._rows: list[int] = []
        self._counts: list[int] = []
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._prompt_sizes: list[np.ndarray] = []

    def add(self, row: int, start: int, stop: int) -> None:
        """Adds start ... stop to a row."""
        next_document, found = self._store.offsets.between(start + 1, stop)
        edges = found.tolist()
        self._rows.append(row)
        self._counts.append(len(edges) + 1)
        self._starts += (start, *edges)
        self._stops += (*edges, stop)
        if self._prompts is not None:
            # The run begins in the document before `next_document`; those from there on begin at the edges.
            document = next_document - 1
            there = self._prompts[document : next_document + len(edges)]
            sizes = np.zeros(len(edges) + 1, np.int64)  # one more than documents where an edge is the stream's end
            sizes[: len(there)] = there
            sizes[0] -= start - int(self._store.offsets[document])
            self._prompt_sizes.append(sizes)

    def pieces(self) -> Pieces:
        """All pieces, without those of no ids: of empty documents, and after an edge at a run's stop."""
        starts_P, stops_P = np.array(self._starts, np.int64), np.array(self._stops, np.int64)
        lengths_P = stops_P - starts_P
        ends_P = np.ones(len(starts_P), bool)
        ends_P[np.cumsum(self._counts) - 1] = False  # a run's last piece ends with the run, the others at an edge
        prompts_P = np.zeros_like(starts_P)
        if self._prompts is not None:
            prompts_P = np.clip(
                np.concatenate(self._prompt_sizes) - 1, 0, lengths_P
            )  # no target is a document's 1st id
        every = Pieces(np.repeat(self._rows, self._counts), starts_P, lengths_P, prompts_P, ends_P)
        return every if lengths_P.all() else Pieces(*(array[lengths_P > 0] for array in every))
