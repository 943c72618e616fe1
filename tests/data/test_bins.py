import numpy as np

from lm.data.bins import best_fit_decreasing


def one_by_one(lengths, capacity):
    """Best-fit decreasing as it is defined; the contents of every bin."""
    bins = []
    for length in sorted(lengths, reverse=True):
        fits = [b for b in bins if sum(b) + length <= capacity]
        if fits:
            max(fits, key=sum).append(length)
        else:
            bins.append([length])
    return bins


def test_the_bins_are_as_full_as_those_of_packing_one_by_one():
    draw = np.random.default_rng(0)
    for trial in range(200):
        capacity = int(draw.integers(1, 40))
        lengths = draw.integers(1, capacity + 1, draw.integers(1, 120)).tolist()
        if trial % 3 == 0:  # many short ones: bins of one history split and meet again
            lengths = np.minimum(draw.geometric(0.3, 300), capacity).tolist()
        found = []
        for alike in best_fit_decreasing(np.bincount(lengths, minlength=capacity + 1), capacity):
            content = [length for length, each, _ in alike.contents for _ in range(each)]
            found += [content] * alike.bins
            assert alike.items == len(content)
        # Which of several bins with the same space takes an item is free, and changes no bin's fullness later.
        assert sorted(map(sum, found)) == sorted(map(sum, one_by_one(lengths, capacity))), (capacity, lengths)


def test_every_item_is_in_one_bin():
    draw = np.random.default_rng(1)
    for _ in range(50):
        capacity = int(draw.integers(1, 60))
        counts = np.bincount(draw.integers(1, capacity + 1, 400), minlength=capacity + 1)
        taken = [[] for _ in counts]
        for alike in best_fit_decreasing(counts, capacity):
            for length, each, first in alike.contents:
                taken[length] += range(first, first + each * alike.bins)
        assert [sorted(items) for items in taken] == [list(range(count)) for count in counts]


def test_the_work_does_not_grow_with_the_items():
    counts = np.full(101, 10**12)
    counts[0] = 0
    found = list(best_fit_decreasing(counts, 100))
    assert sum(alike.bins for alike in found) * 100 >= 5050 * 10**12
    assert len(found) < 1000
