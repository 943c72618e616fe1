"""The rows of pairs, by number, as a plan has packed them: sources and targets side by side.

Shapes: B rows, T target positions in a row, S source positions, P pairs of all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lm.data.packing import Batch
from lm.data.pair_plan import plan_of
from lm.data.pairs import Limits, PairStore
from lm.data.tokens import TokenStore
from lm.nn.source import Source


class PairRows:
    """Rows of pairs, the same in every epoch: `lm.data.rows.Rows` for an encoder–decoder.

    A pair has the same segment number on both sides of its row, and is never cut in two. Of the target side, inputs are
    the start id and then the target's ids, targets these and EOS, each with weight 1.

    Args:
        start_id: what a target follows.
        packing: "padded" is a row a pair; else pairs share rows as well as they fit.
        say: told when rows have to be planned.

    Raises InputError where the limits leave no pair.
    """

    padded = True

    def __init__(
        self,
        store: PairStore,
        limits: Limits,
        *,
        start_id: int,
        packing: str,
        say: Callable[[str], None] | None = None,
    ):
        self.store, self.context, self.source_context = store, limits.target, limits.source
        self._start = start_id
        self._plan = plan_of(store, limits, packing=packing, say=say)
        self.counts, self.pairs = self._plan.counts, self._plan.pairs
        self.tokens, self.source_tokens = self._plan.target_tokens, self._plan.source_tokens

    def __len__(self) -> int:
        return len(self._plan)

    def cut(self, rows_B: Sequence[int], epochs_B: Sequence[int], *, seed: int) -> Batch:
        """Some rows, whatever their epochs and the seed."""
        counts_B, pieces_P = self._plan.pieces(rows_B)
        rows_P = np.repeat(np.arange(len(rows_B)), counts_B)
        numbers_P = np.arange(1, len(rows_P) + 1) - np.repeat(np.cumsum(counts_B) - counts_B, counts_B)
        sources, targets = self.store
        full_P = np.ones(len(rows_P), bool)
        read = _read(sources, pieces_P["source_start"], pieces_P["source"], full_P)
        source_BS, segments_BS, positions_BS = _laid_out(*read, rows_P, numbers_P, (len(rows_B), self.source_context))
        read = _read(targets, pieces_P["target_start"], pieces_P["target"], pieces_P["whole"])
        targets_BT, segments_BT, positions_BT = _laid_out(*read, rows_P, numbers_P, (len(rows_B), self.context))
        tokens_BT = np.zeros_like(targets_BT)
        tokens_BT[:, 1:] = targets_BT[:, :-1]
        tokens_BT[segments_BT == 0] = 0
        tokens_BT[(segments_BT > 0) & (positions_BT == 0)] = self._start
        weights_BT = (segments_BT > 0).astype(np.float32)
        source = Source(source_BS, segments_BS, positions_BS)
        return Batch(tokens_BT, targets_BT, weights_BT, segments_BT, positions_BT, source)


def _read(
    store: TokenStore, starts_P: np.ndarray, counts_P: np.ndarray, whole_P: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The ids of the pieces one after another, EOS behind those that are `whole` where there is one, and how many of
    them each piece has."""
    ends_P = whole_P & (store.eos is not None)
    lengths_P = counts_P.astype(np.int64) + ends_P
    ids = np.empty(lengths_P.sum(), np.int32)
    places = (np.cumsum(lengths_P) - lengths_P).tolist()
    for place, start, count in zip(places, starts_P.tolist(), counts_P.tolist(), strict=True):
        ids[place : place + count] = store.read(start, start + count)
    ids[(np.cumsum(lengths_P) - 1)[ends_P]] = store.eos or 0
    return ids, lengths_P


def _laid_out(
    ids: np.ndarray, lengths_P: np.ndarray, rows_P: np.ndarray, numbers_P: np.ndarray, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, segments, positions) of rows, int32, padded with 0: each piece follows the one before it in its row."""
    begins_P = np.cumsum(lengths_P) - lengths_P
    firsts_B = np.searchsorted(rows_P, np.arange(shape[0]))
    of_piece = np.repeat(np.arange(len(rows_P)), lengths_P)
    columns = np.arange(len(ids)) - begins_P[firsts_B][rows_P][of_piece]
    assert columns.max() < shape[1], "a row is longer than the context"
    laid = np.zeros((3, *shape), np.int32)
    laid[:, rows_P[of_piece], columns] = ids, numbers_P[of_piece], np.arange(len(ids)) - begins_P[of_piece]
    return laid[0], laid[1], laid[2]
