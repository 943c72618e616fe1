"""Powers of two against numpy's."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lm.nn.exponential import exp2_below


@pytest.mark.parametrize("below", [0, 50])
def test_powers_of_two(below):
    ends = np.linspace(below - 126, below + 126.4, 100_001), np.linspace(-1, 1, 10_001)
    x = np.concatenate(ends).astype(np.float32)
    y = np.asarray(jax.jit(lambda x: exp2_below(x, below))(x), np.float64)
    np.testing.assert_allclose(y, 2.0 ** (x.astype(np.float64) - below), rtol=3e-7)


def test_beyond_float32_they_are_its_ends():
    x = np.array([-np.inf, -1000, 1000, np.inf, np.nan], np.float32)
    least, greatest = 2.0**-126, 2.0**127
    np.testing.assert_array_equal(jax.jit(lambda x: exp2_below(x, 0))(x), [least, least, *[greatest] * 3])
