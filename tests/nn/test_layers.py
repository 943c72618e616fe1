"""Positions and dropout against their formulas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lm.nn import layers
from lm.nn.layers import Dropout, drop, llama3_frequencies, rotary, rotary_frequencies, rotary_table, sinusoidal


def test_rotary_turns_by_position_and_scores_depend_on_distance():
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 8)) for i in (0, 1))

    def at(x, position):
        return rotary(x, rotary_table(jnp.array([[position]]), rotary_frequencies(8, base=100.0)))

    def score(i, j):
        return float(jnp.sum(at(q, i) * at(k, j)))

    np.testing.assert_allclose(at(q, 0), q, atol=1e-7)
    assert abs(score(5, 3) - score(105, 103)) < 1e-4  # distance alone counts
    assert abs(score(5, 3) - score(5, 4)) > 1e-2
    pair = np.asarray(q).reshape(8)[[0, 4]]  # dimensions h and h + H/2 turn together, at frequency base^(-2h/H)
    turned = np.array([[np.cos(2), -np.sin(2)], [np.sin(2), np.cos(2)]]) @ pair
    np.testing.assert_allclose(np.asarray(at(q, 2)).reshape(8)[[0, 4]], turned, atol=1e-6)


def test_a_cpu_computes_cosine_and_sine_once_for_all_heads_and_layers(monkeypatch):
    def compiled() -> str:
        def turned_twice(x, positions):
            table = rotary_table(positions, rotary_frequencies(16, base=100.0))
            once = jnp.einsum("btnh,hi->btni", rotary(x, table), jnp.ones((16, 16)))  # as between two layers
            return rotary(once, table)

        shapes = (jax.ShapeDtypeStruct((2, 32, 4, 16), jnp.float32), jax.ShapeDtypeStruct((2, 32), jnp.int32))
        return jax.jit(turned_twice).lower(*shapes).compile().as_text()

    assert compiled().count(" cosine(") == 1
    monkeypatch.setattr(layers, "_kept", lambda table: table)
    assert compiled().count(" cosine(") > 1, "the check can fail"


def test_llama3_stretches_long_wavelengths_and_keeps_short_ones():
    """With the numbers of Llama 3.1: base 500,000, factor 8, from 8192 tokens, a quarter and all of them the bounds."""
    frequency = 500_000.0 ** (-np.arange(64) / 64)
    wavelength = 2 * np.pi / frequency
    wanted = np.where(wavelength > 8192 / 1, frequency / 8, frequency)
    between = (wavelength <= 8192 / 1) & (wavelength >= 8192 / 4)
    assert 3 < between.sum() < 61 and (wavelength > 8192).sum() > 3
    share = (8192 / wavelength - 1) / (4 - 1)
    wanted[between] = ((1 - share) * frequency / 8 + share * frequency)[between]
    got = rotary_frequencies(128, base=500_000.0)
    np.testing.assert_allclose(got, frequency, rtol=2e-6)  # float32 power
    got = llama3_frequencies(got, factor=8.0, low=1.0, high=4.0, original_positions=8192)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, wanted, rtol=5e-6)


def test_sinusoidal_table():
    table = np.asarray(sinusoidal(jnp.array([[0, 1, 50]]), 6))[0]
    for row, position in zip(table, (0, 1, 50), strict=True):
        for pair in range(3):
            angle = position / 10_000 ** (2 * pair / 6)
            np.testing.assert_allclose(row[2 * pair : 2 * pair + 2], [np.sin(angle), np.cos(angle)], atol=1e-5)


def test_dropout_rate_scale_and_rows():
    keys = jax.random.split(jax.random.key(0), 4)
    x = jnp.ones((4, 100, 50))
    y = drop(x, Dropout(0.3, keys))
    assert set(np.unique(np.asarray(y))) == {0.0, np.float32(1 / np.float32(0.7))}
    assert abs(float(jnp.mean(y == 0)) - 0.3) < 0.01  # 20,000 draws: three standard deviations
    # a row's mask is its own key's: the same in any company, another for each row and each place
    np.testing.assert_array_equal(drop(x[2:3], Dropout(0.3, keys[2:3]))[0], y[2])
    assert not np.array_equal(y[0], y[1])
    assert not np.array_equal(drop(x, Dropout(0.3, keys).at(0, 1)), drop(x, Dropout(0.3, keys).at(1, 0)))
    assert drop(x, None) is x
