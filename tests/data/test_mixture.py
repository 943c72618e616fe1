import itertools

import pytest

from lm.data.mixture import Mixture

WEIGHTS = [[1.0], [0.7, 0.3], [0.5, 0.5], [3, 1, 2], [0.29, 0.71], [0.001, 0.999], [1 / 3, 1 / 3, 1 / 3], [5e-7, 1.0]]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_row_is_the_next_of_one_component(weights):
    mixture = Mixture(weights)
    drawn = [0] * len(weights)
    for row in range(3000):
        assert mixture.counts(row) == drawn
        component, index = mixture.locate(row)
        assert index == drawn[component]
        drawn[component] += 1


@pytest.mark.parametrize("weights", WEIGHTS)
def test_shares_are_exact_to_within_a_row_a_component(weights):
    mixture = Mixture(weights)
    for rows in (1, 10, 999, 10**6, 10**15 + 7):
        counts = mixture.counts(rows)
        assert sum(counts) == rows
        for count, weight in zip(counts, weights, strict=True):
            # 1e-15: the expectation itself is computed in floating point
            assert abs(count - rows * (weight / sum(weights))) <= len(weights) + 1e-15 * rows


def test_decimal_weights_are_meant_as_they_are_written():
    assert Mixture([0.7, 0.3]).counts(10**20) == [7 * 10**19, 3 * 10**19]  # the float 0.7 is 5e-17 off


def test_components_are_interleaved_evenly():
    mixture = Mixture([3, 1])
    found = [mixture.locate(row)[0] for row in range(4000)]
    assert all(sum(found[n : n + 4]) == 1 for n in range(0, 4000, 4))
    assert len(set(itertools.accumulate(found))) == 1001
