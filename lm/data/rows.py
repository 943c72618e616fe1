"""The rows of one token store, by number: cut from the stream where they fall, or as a plan has packed them.

Shapes: B rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from lm.config import InputError
from lm.data.packing import Batch, Pieces, Store, cut_pieces
from lm.data.plan import Plan, plan_of
from lm.data.runs import cut_runs


class Rows(Protocol):
    """The rows of an epoch of a store, numbered from 0. Together they hold every id of the store once.

    Every id is then an input once, and every id but each document's first a target once. Of pairs, see
    `lm.data.pair_rows`.
    """

    context: int
    """Positions in a row; of pairs in its target side."""
    tokens: int
    """Tokens that the rows hold together; of pairs those of targets."""
    source_tokens: int
    """Of pairs those of sources; else 0."""
    padded: bool
    """Whether rows in number may have positions without a token."""

    @property
    def source_context(self) -> int | None:
        """Of pairs, positions in the source side of a row; None: there is none."""
        ...

    def __len__(self) -> int: ...

    def cut(self, rows_B: Sequence[int], epochs_B: Sequence[int], *, seed: int) -> Batch:
        """Some rows, each of an epoch. The seed is of what differs from epoch to epoch."""
        ...


def make_rows(
    store: Store, *, context: int, packing: str, prompt_loss: bool, say: Callable[[str], None] | None = None
) -> Rows:
    """The rows of a store as `data.packing` asks for them.

    Args:
        prompt_loss: whether ids of prompts count as targets.
        say: told when rows have to be planned, which takes seconds for millions of documents.

    Raises:
        InputError: a store without ids, or with packing "split" of fewer than a row.
    """
    if packing == "split":
        return SplitRows(store, context=context, prompt_loss=prompt_loss)
    if not store.num_tokens:
        raise InputError(f"{store.source} has no tokens: use more text")
    plan = plan_of(store, context=context, packing=packing, say=say)
    return PlannedRows(store, plan, context=context, prompt_loss=prompt_loss)


class SplitRows:
    """The stream cut every `context` ids.

    It is circular, and where an epoch's first cut falls is drawn for each epoch, so that a small corpus doesn't show
    the same cuts again and again. Only the last row of an epoch may be padded.
    """

    def __init__(self, store: Store, *, context: int, prompt_loss: bool):
        if store.num_tokens < context:
            raise InputError(
                f"{store.source} has {store.num_tokens} tokens, less than one row of data.context {context}: "
                f"use more text or a context of at most {store.num_tokens}"
            )
        self.store, self.context, self.padded = store, context, False
        self.source_context, self.source_tokens, self.tokens = None, 0, store.num_tokens
        self._prompts = None if prompt_loss else store.prompts

    def __len__(self) -> int:
        return -(-self.store.num_tokens // self.context)

    def cut(self, rows_B: Sequence[int], epochs_B: Sequence[int], *, seed: int) -> Batch:
        size = self.store.num_tokens
        first_cuts = {epoch: self._first_cut(epoch, seed) for epoch in set(epochs_B)}
        begins_B = [row * self.context for row in rows_B]
        starts_B = [(first_cuts[epoch] + begin) % size for epoch, begin in zip(epochs_B, begins_B, strict=True)]
        lengths_B = [min(self.context, size - begin) for begin in begins_B]
        return cut_runs(self.store, starts_B, lengths_B, context=self.context, prompts=self._prompts)

    def _first_cut(self, epoch: int, seed: int) -> int:
        """Where in the stream an epoch begins. A hash, because NumPy's generators may change between versions."""
        digest = hashlib.sha256(f"first cut of epoch {epoch}, seed {seed}".encode()).digest()
        return int.from_bytes(digest[:16]) % self.store.num_tokens


class PlannedRows:
    """Rows as a plan has them, the same in every epoch."""

    def __init__(self, store: Store, plan: Plan, *, context: int, prompt_loss: bool):
        self.store, self.context, self.padded = store, context, True
        self.source_context, self.source_tokens, self.tokens = None, 0, store.num_tokens
        self._plan, self._prompt_loss = plan, prompt_loss

    def __len__(self) -> int:
        return len(self._plan)

    def cut(self, rows_B: Sequence[int], epochs_B: Sequence[int], *, seed: int) -> Batch:
        counts_B, every = self._plan.pieces(rows_B)
        rows_P = np.repeat(np.arange(len(rows_B)), counts_B)
        prompts_P = np.zeros(len(every), np.int64) if self._prompt_loss else every["prompt"].astype(np.int64)
        pieces = Pieces(rows_P, every["start"], every["length"].astype(np.int64), prompts_P, every["ends"])
        return cut_pieces(self.store, pieces, rows=len(rows_B), context=self.context)
