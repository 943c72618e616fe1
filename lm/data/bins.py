"""Best-fit decreasing bin packing of many items of few lengths: whole groups of equal bins at once.

After Ding et al. 2024, "Fewer Truncations Improve Language Modeling" (arXiv:2404.10830, section 3): longest first, each
item into the bin with the least space that takes it, else into a new one. With items of one length after another, a
bin that takes one takes as many as fit, because it then has the least space of all; so bins with the same space and
the same history need to be looked at once. The work grows with the capacity, not with the items.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Alike(NamedTuple):
    """Bins with the same lengths in them."""

    bins: int
    contents: list[tuple[int, int, int]]
    """(length, items of it in each bin, first of them): bin b has the items first + b each ... first + (b + 1) each of
    all items of that length."""

    @property
    def items(self) -> int:
        """Items in each bin."""
        return sum(each for _, each, _ in self.contents)


class _Filling(NamedTuple):
    """Bins that took `each` items of a length, from item `first` on, when they were the bins `skip` ... of `before`."""

    length: int
    each: int
    first: int
    skip: int
    before: _Filling | None


class _Group(NamedTuple):
    """A range of the bins of a filling; None: empty bins."""

    filling: _Filling | None
    skip: int
    bins: int


def best_fit_decreasing(counts: np.ndarray, capacity: int) -> Iterator[Alike]:
    """Packs `counts[length]` items of each length 1 ... capacity."""
    groups: dict[int, list[_Group]] = {}  # by the space left in their bins
    spaces: list[int] = []  # that there are groups of, ascending

    def put(space: int, group: _Group) -> None:
        if group.bins:
            if space not in groups:
                groups[space] = []
                bisect.insort(spaces, space)
            groups[space].append(group)

    for length in np.flatnonzero(counts)[::-1].tolist():
        items, first = int(counts[length]), 0
        while items:
            place = bisect.bisect_left(spaces, length)
            if place == len(spaces):
                put(capacity, _Group(None, 0, -(-items // (capacity // length))))
            space = spaces[place]
            filling, skip, there = groups[space].pop()
            each = min(space // length, items)
            taken = min(there, items // each)
            put(space - each * length, _Group(_Filling(length, each, first, skip, filling), 0, taken))
            put(space, _Group(filling, skip + taken, there - taken))
            if not groups[space]:
                del groups[space], spaces[bisect.bisect_left(spaces, space)]
            items, first = items - taken * each, first + taken * each
    for left in groups.values():
        for group in left:
            yield _alike(group)


def _alike(group: _Group) -> Alike:
    contents = []
    filling: _Filling | None = group.filling
    skip = group.skip
    while filling is not None:
        contents.append((filling.length, filling.each, filling.first + skip * filling.each))
        skip += filling.skip
        filling = filling.before
    return Alike(group.bins, contents[::-1])
