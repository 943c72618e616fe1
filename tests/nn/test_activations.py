"""Activations against their formulas."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.nn.activations import ACTIVATIONS, gelu

from .gradients import assert_gradients_equal


def test_activations():
    x = jnp.array([-2.0, 0.0, 3.0])
    np.testing.assert_allclose(ACTIVATIONS["relu2"](x), [0, 0, 9])
    np.testing.assert_allclose(ACTIVATIONS["gelu"](x), [-0.04550026, 0, 2.9959502], atol=1e-6)
    np.testing.assert_allclose(ACTIVATIONS["gelu_tanh"](x), [-0.0454023, 0, 2.9963627], atol=1e-6)
    np.testing.assert_allclose(ACTIVATIONS["swiglu"](x), [-0.23840584, 0, 2.8577224], atol=1e-6)
    np.testing.assert_array_equal(ACTIVATIONS["geglu"](x), ACTIVATIONS["gelu_tanh"](x))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_gelu_is_the_formulas(dtype):
    def formula(x):
        wide = x.astype(jnp.float32)
        return (0.5 * wide * (1 + jax.lax.erf(wide / 2**0.5))).astype(x.dtype)

    x = jnp.concatenate([jnp.linspace(-6, 6, 101), jnp.array([-100.0, 0.0, 100.0])])
    assert_gradients_equal(gelu, formula, x.astype(dtype))


def test_the_slope_of_gelu_is_exact_to_rounding():
    """Against float64; erf in float32, too, is good to 2e-7."""
    x = np.linspace(-12, 12, 20_001).astype(np.float32)
    slope = np.asarray(jax.jit(jax.vmap(jax.grad(gelu)))(x), np.float64)
    normal = np.exp(-(x.astype(np.float64) ** 2) / 2) / math.sqrt(2 * math.pi)
    wanted = np.array([0.5 * math.erfc(-u / math.sqrt(2)) for u in x.tolist()]) + x * normal
    np.testing.assert_allclose(slope, wanted, atol=4e-7)
