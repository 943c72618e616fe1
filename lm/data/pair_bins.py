"""Pairs -> rows with room for so much source and so much target: bin packing in two dimensions.

Best-fit decreasing as for documents (`lm/data/bins.py`), with a pair's size being the larger of the parts that its
sides take of a row: largest first, each pair into the row that has the least room for both sides together, else into a
new one. Shapes: K pairs, N rows, O open rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

BLOCK = 2**15
"""Pairs packed among themselves: the work grows with them times the rows that they open."""
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio: multiples of it, modulo 2^64, are spread evenly (Knuth, volume 3, section 6.4)."""


def best_fit(sources_K: np.ndarray, targets_K: np.ndarray, *, source: int, target: int) -> Iterator[np.ndarray]:
    """Packs pairs of such lengths, of 1 ... source and 1 ... target tokens; gives each row's pairs, int64.

    Which pairs are packed among themselves, and which of equal ones share a row, doesn't follow their order in the
    corpus: neighbours are often alike.
    """
    spread_K = np.argsort(np.arange(len(sources_K), dtype=np.uint64) * _SPREAD, kind="stable")
    for low in range(0, len(spread_K), BLOCK):
        block_K = spread_K[low : low + BLOCK]
        a_K, b_K = sources_K[block_K].astype(np.int64), targets_K[block_K].astype(np.int64)
        parts_K = np.stack([a_K * target, b_K * source])  # of a row, times source x target
        order_K = np.lexsort((b_K, a_K, -parts_K.sum(0), -parts_K.max(0)))
        for row in _best_fit_in_order(a_K[order_K], b_K[order_K], source, target):
            yield block_K[order_K[row]]


def _best_fit_in_order(a_K: np.ndarray, b_K: np.ndarray, source: int, target: int) -> Iterator[np.ndarray]:
    """Of pairs of equal lengths, which follow one another, a row takes as many as fit: it has the least room then."""
    edges = np.flatnonzero((np.diff(a_K) != 0) | (np.diff(b_K) != 0)) + 1
    smallest_a, smallest_b = a_K.min(), b_K.min()
    rows: list[list[range]] = []
    left_a, left_b, left, numbers_O = np.zeros((4, len(a_K)), np.int64)
    opened = 0
    for first, stop in zip([0, *edges.tolist()], [*edges.tolist(), len(a_K)], strict=True):
        a, b = int(a_K[first]), int(b_K[first])
        while first < stop:
            fits_O = (left_a[:opened] >= a) & (left_b[:opened] >= b)
            place = int(np.where(fits_O, left[:opened], np.iinfo(np.int64).max).argmin()) if opened else 0
            if not opened or not fits_O[place]:
                place, opened = opened, opened + 1
                left_a[place], left_b[place], numbers_O[place] = source, target, len(rows)
                rows.append([])
            each = min(int(left_a[place]) // a, int(left_b[place]) // b, stop - first)
            rows[numbers_O[place]].append(range(first, first + each))
            first += each
            left_a[place] -= each * a
            left_b[place] -= each * b
            left[place] = left_a[place] * target + left_b[place] * source
            if left_a[place] < smallest_a or left_b[place] < smallest_b:  # no pair fits any more
                opened -= 1
                for array in (left_a, left_b, left, numbers_O):
                    array[place] = array[opened]
    for row in rows:
        yield np.concatenate([np.arange(each.start, each.stop) for each in row])
