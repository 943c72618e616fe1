"""Norms against their formulas, and their own backward passes against the formulas' gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.nn.norms import layer_norm, rms_norm

from .gradients import assert_gradients_equal

EPSILON = 1e-3


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


def plain(x, scale, bias=None, *, centred, offset):
    """The formula, in float32 whatever the dtype of x."""
    wide = x.astype(jnp.float32)
    if centred:
        wide = wide - wide.mean(-1, keepdims=True)
    y = wide / jnp.sqrt((wide * wide).mean(-1, keepdims=True) + EPSILON) * (scale + offset)[None, None]
    return (y if bias is None else y + bias[None, None]).astype(x.dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["rms", "rms with offset", "layer", "layer with bias"])
def test_gradients_are_the_formulas(form, dtype):
    offset = form == "rms with offset"

    def ours(x, *params):
        if form.startswith("rms"):
            return rms_norm(x, *params, epsilon=EPSILON, offset=offset)
        return layer_norm(x, params[0], params[1] if len(params) > 1 else None, epsilon=EPSILON)

    def formula(x, *params):
        return plain(x, *params, centred=form.startswith("layer"), offset=offset)

    x = 1 + 2 * jax.random.normal(jax.random.key(0), (2, 5, 33))  # a mean that is not 0
    params = [jax.random.normal(jax.random.key(i), (33,)) for i in (1, 2)][: 2 if "bias" in form else 1]
    assert_gradients_equal(ours, formula, x.astype(dtype), *params)


def test_norms_keep_bfloat16_and_compute_in_float32():
    x = (300 + jnp.arange(4096, dtype=jnp.float32) / 4096).astype(jnp.bfloat16)[None, None]
    y = rms_norm(x, jnp.ones(4096), epsilon=1e-5, offset=False)
    assert y.dtype == jnp.bfloat16
    assert float(jnp.abs(y.astype(jnp.float32) - 1).max()) < 0.01  # a bfloat16 mean of 4096 squares is off by far more
