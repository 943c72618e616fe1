"""Batches as a pure function of (seed, step), so that nothing but the step has to be saved to continue a run.

Shapes: B rows in the batch, T positions in a row.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction

import grain
import numpy as np

from lm.data.mixture import Mixture
from lm.data.packing import Batch, arrays_of, of_arrays
from lm.data.rows import Rows

PREFETCH_BATCHES = 4


class Pipeline:
    """The training batches of one or several token stores, as (share of the tokens, of any scale; rows) each.

    An epoch of a store is all its rows in an order of its own. Those of several are interleaved by weight, each going
    through epochs of its own; `rows_per_epoch` is then all rows that they have together, a measure of length: a store
    with a large weight is seen more than once in that time, one with a small weight in part.
    """

    def __init__(self, components: Sequence[tuple[float, Rows]], *, batch_size: int, seed: int):
        self.components = tuple(rows for _, rows in components)
        self.batch_size = batch_size
        ((self.context, self.source_context),) = {(rows.context, rows.source_context) for rows in self.components}
        self.rows_per_epoch = sum(len(rows) for rows in self.components)
        # Rows of different stores are filled differently: a share of the tokens is another share of the rows.
        self._mixture = Mixture([Fraction(str(weight)) * len(rows) / rows.tokens for weight, rows in components])
        self._seeds = [_component_seed(seed, number) for number in range(len(components))]
        # Shuffle before repeat: each epoch is then a permutation of the rows, and another one.
        self._orders = [
            grain.MapDataset.range(len(rows)).seed(of_its_own).shuffle().repeat()
            for rows, of_its_own in zip(self.components, self._seeds, strict=True)
        ]

    def batch_at(self, step: int, rows: slice | None = None) -> Batch:
        """The batch of a step (from 0), or some rows of it: a host's share."""
        wanted = range(step * self.batch_size, (step + 1) * self.batch_size)[rows or slice(None)]
        located = [self._mixture.locate(index) for index in wanted]
        parts = {number: self._cut(number, located) for number in sorted({number for number, _ in located})}
        if len(parts) == 1:
            return parts.popitem()[1]
        first = arrays_of(next(iter(parts.values())))
        batch = [np.empty((len(wanted), *array.shape[1:]), array.dtype) for array in first]
        for number, part in parts.items():
            places = [place for place, (component, _) in enumerate(located) if component == number]
            for whole, array in zip(batch, arrays_of(part), strict=True):
                whole[places] = array
        return of_arrays(batch)

    def iterate(self, start_step: int = 0, rows: slice | None = None, *, threads: int = 2) -> Iterator[Batch]:
        """The same batches from `start_step` on, without end, made ahead of time in background threads.

        `close()` of the iterator ends the threads; what is raised in one is raised here, in its batch's turn.
        """
        batches = grain.MapDataset.range(start_step, sys.maxsize).map(lambda step: self.batch_at(step, rows))
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(PREFETCH_BATCHES, 2 * threads))
        return iter(batches.to_iter_dataset(options))

    def shares(self, steps: int) -> list[float]:
        """The share of each component in the tokens of the first steps: counted, not the weights."""
        counts = self._mixture.counts(steps * self.batch_size)
        tokens = [count * self._tokens_a_row(rows) for count, rows in zip(counts, self.components, strict=True)]
        return [each / sum(tokens) for each in tokens]

    def fill(self, steps: int) -> float:
        """The part of all positions of the first steps that hold tokens, on average: the rest is padding."""
        counts = self._mixture.counts(steps * self.batch_size)
        tokens = sum(count * self._tokens_a_row(rows) for count, rows in zip(counts, self.components, strict=True))
        return tokens / (sum(counts) * self.context)

    def source_fill(self, steps: int) -> float | None:
        """`fill` of the source side of pairs. None: there is none."""
        if self.source_context is None:
            return None
        counts = self._mixture.counts(steps * self.batch_size)
        parts = zip(counts, self.components, strict=True)
        return sum(n * rows.source_tokens / len(rows) for n, rows in parts) / (sum(counts) * self.source_context)

    @property
    def tokens_per_step(self) -> int:
        """Tokens in a batch, on average, of pairs those of targets; of rows that are cut where they fall every position
        holds one."""
        rows = [rows for rows in self.components if rows.padded]
        return round(self.batch_size * self.context * self.fill(1000)) if rows else self.batch_size * self.context

    def _tokens_a_row(self, rows: Rows) -> float:
        return rows.tokens / len(rows)

    def _cut(self, number: int, located: list[tuple[int, int]]) -> Batch:
        """The rows of a component, of those located."""
        rows, order = self.components[number], self._orders[number]
        indices = [index for component, index in located if component == number]
        return rows.cut(
            [order[index] for index in indices], [index // len(rows) for index in indices], seed=self._seeds[number]
        )


def _component_seed(seed: int, number: int) -> int:
    """A component's own: two with the same text must not show the same rows together. Of the first, the run's own.

    Not seed + number: a seed one higher is the order of an epoch later.
    """
    if not number:
        return seed
    return int.from_bytes(hashlib.sha256(f"component {number}, seed {seed}".encode()).digest()[:4])
