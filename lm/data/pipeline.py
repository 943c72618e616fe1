"""Batches as a pure function of (seed, step), so that nothing but the step has to be saved to continue a run.

Shapes: B rows in the batch, T positions in a row.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator

import grain
import numpy as np

from lm.config import InputError
from lm.data.packing import Batch, cut_rows
from lm.data.tokens import TokenStore

PREFETCH_THREADS = 2
PREFETCH_BATCHES = 4


class Pipeline:
    """The training batches of a token store.

    An epoch is all rows of the stream in an order of its own. Where its first cut falls is drawn for each epoch, so
    that a small corpus doesn't show the same cuts again and again.
    """

    def __init__(self, store: TokenStore, *, context: int, batch_size: int, seed: int):
        if store.num_tokens < context:
            raise InputError(
                f"{store.source} has {store.num_tokens} tokens, less than one row of data.context {context}: "
                f"use more text or a context of at most {store.num_tokens}"
            )
        self.store, self.context, self.batch_size, self.seed = store, context, batch_size, seed
        self.rows_per_epoch = -(-store.num_tokens // context)
        self.tokens_per_step = batch_size * context
        # Shuffle before repeat: each epoch is then a permutation of the rows, and another one.
        self._order = grain.MapDataset.range(self.rows_per_epoch).seed(seed).shuffle().repeat()

    def batch_at(self, step: int, rows: slice | None = None) -> Batch:
        """The batch of a step (from 0), or some rows of it: a host's share."""
        wanted = range(step * self.batch_size, (step + 1) * self.batch_size)[rows or slice(None)]
        epochs_B = np.array([index // self.rows_per_epoch for index in wanted], np.int64)
        rows_B = np.array([self._order[index] for index in wanted], np.int64)
        cuts = {epoch: self._first_cut(epoch) for epoch in set(epochs_B.tolist())}
        begins_B = rows_B * self.context
        size = self.store.num_tokens
        starts_B = (np.array([cuts[epoch] for epoch in epochs_B.tolist()], np.int64) + begins_B) % size
        lengths_B = np.minimum(self.context, size - begins_B)
        return cut_rows(self.store.ids, self.store.offsets, starts_B, lengths_B, context=self.context)

    def iterate(self, start_step: int = 0, rows: slice | None = None) -> Iterator[Batch]:
        """The same batches from `start_step` on, without end, made ahead of time in background threads."""
        batches = grain.MapDataset.range(start_step, sys.maxsize).map(lambda step: self.batch_at(step, rows))
        options = grain.ReadOptions(num_threads=PREFETCH_THREADS, prefetch_buffer_size=PREFETCH_BATCHES)
        return iter(batches.to_iter_dataset(options))

    def _first_cut(self, epoch: int) -> int:
        """Where in the stream an epoch begins. A hash, because NumPy's generators may change between versions."""
        digest = hashlib.sha256(f"first cut of epoch {epoch}, seed {self.seed}".encode()).digest()
        return int.from_bytes(digest[:16]) % self.store.num_tokens
