"""Norms, positions, activations and dropout against their formulas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lm.nn.activations import ACTIVATIONS
from lm.nn.layers import Dropout, drop, llama3_frequencies, rotary, rotary_frequencies, sinusoidal
from lm.nn.norms import layer_norm, rms_norm


def test_norms_against_float64():
    x = 3 + 2 * np.random.default_rng(0).normal(size=(2, 5, 33))
    scale, bias = np.linspace(0.5, 2, 33), np.linspace(-1, 1, 33)
    arrays = [jnp.asarray(v, jnp.float32) for v in (x, scale, bias)]
    centred = x - x.mean(-1, keepdims=True)
    wanted = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + bias
    np.testing.assert_allclose(layer_norm(*arrays, epsilon=1e-5), wanted, atol=1e-5)
    wanted = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(rms_norm(*arrays[:2], epsilon=1e-5, offset=False), wanted, atol=1e-5)
    less = arrays[1] - 1
    np.testing.assert_allclose(rms_norm(arrays[0], less, epsilon=1e-5, offset=True), wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["rms", "layer"])
def test_gradients_of_norms_against_differences(name):
    x, scale, bias = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(3, 9), (9,), (9,)]))
    norm = (
        (lambda x, s, b: rms_norm(x, s, epsilon=1e-3, offset=False))
        if name == "rms"
        else (lambda *a: layer_norm(*a, epsilon=1e-3))
    )
    check_grads(norm, (x, scale, bias), order=1, modes=["rev"], rtol=2e-2)


def test_norms_keep_bfloat16_and_compute_in_float32():
    x = (300 + jnp.arange(4096, dtype=jnp.float32) / 4096).astype(jnp.bfloat16)[None, None]
    y = rms_norm(x, jnp.ones(4096), epsilon=1e-5, offset=False)
    assert y.dtype == jnp.bfloat16
    assert float(jnp.abs(y.astype(jnp.float32) - 1).max()) < 0.01  # a bfloat16 mean of 4096 squares is off by far more


def test_rotary_turns_by_position_and_scores_depend_on_distance():
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 8)) for i in (0, 1))

    def at(x, position):
        return rotary(x, jnp.array([[position]]), rotary_frequencies(8, base=100.0))

    def score(i, j):
        return float(jnp.sum(at(q, i) * at(k, j)))

    np.testing.assert_allclose(at(q, 0), q, atol=1e-7)
    assert abs(score(5, 3) - score(105, 103)) < 1e-4  # distance alone counts
    assert abs(score(5, 3) - score(5, 4)) > 1e-2
    pair = np.asarray(q).reshape(8)[[0, 4]]  # dimensions h and h + H/2 turn together, at frequency base^(-2h/H)
    turned = np.array([[np.cos(2), -np.sin(2)], [np.sin(2), np.cos(2)]]) @ pair
    np.testing.assert_allclose(np.asarray(at(q, 2)).reshape(8)[[0, 4]], turned, atol=1e-6)


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


def test_activations():
    x = jnp.array([-2.0, 0.0, 3.0])
    np.testing.assert_allclose(ACTIVATIONS["relu2"](x), [0, 0, 9])
    np.testing.assert_allclose(ACTIVATIONS["gelu"](x), [-0.04550026, 0, 2.9959502], atol=1e-6)
    np.testing.assert_allclose(ACTIVATIONS["gelu_tanh"](x), [-0.0454023, 0, 2.9963627], atol=1e-6)
    np.testing.assert_allclose(ACTIVATIONS["swiglu"](x), [-0.23840584, 0, 2.8577224], atol=1e-6)
    np.testing.assert_array_equal(ACTIVATIONS["geglu"](x), ACTIVATIONS["gelu_tanh"](x))


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
