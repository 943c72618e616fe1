"""What the backward pass makes of what was kept: the same numbers, and not before it is there."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.nn import activations, attention, norms
from lm.nn.attention import AttentionMask
from lm.nn.late import late
from lm.nn.matmul import numerics, project

LAYERS = 8
BFLOAT16 = numerics("bfloat16")


def test_it_is_x():
    x = jnp.array([[0.1, -3e38, jnp.inf]], jnp.float32)
    for dtype in ("float32", "bfloat16"):
        given = x.astype(dtype)
        found = jax.jit(late)(given, jnp.array([[-7.0]], dtype))
        assert found.dtype == given.dtype
        np.testing.assert_array_equal(found, given)


def attended(x):
    """One head as wide as x, of 512 positions a row."""
    q = x.reshape(-1, 512, 1, x.shape[-1])
    form = {"scale": 0.1, "softcap": None, "numerics": BFLOAT16, "dropout": None}
    return attention.attend(q, q, q, AttentionMask(True), **form).reshape(x.shape)


BLOCKS = {
    "gelu": (activations, activations.gelu),
    "rms": (norms, lambda x: norms.rms_norm(x, jnp.ones(x.shape[-1]), epsilon=1e-5, offset=False)),
    "layer": (norms, lambda x: norms.layer_norm(x, jnp.ones(x.shape[-1]), None, epsilon=1e-5)),
    "attention": (attention, attended),
}


def temporary_bytes(block):
    """Of the gradient of some residual blocks, each between two products, in the CPU's memory."""

    def loss(x, w):
        for _ in range(LAYERS):
            x = x + project(
                block(project(x, w, None, inputs=1, numerics=BFLOAT16)), w, None, inputs=1, numerics=BFLOAT16
            )
        return jnp.sum(x.astype(jnp.float32))

    x, w = jax.ShapeDtypeStruct((2048, 64), jnp.bfloat16), jax.ShapeDtypeStruct((64, 64), jnp.float32)
    return jax.jit(jax.grad(loss)).lower(x, w).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", BLOCKS)
def test_what_the_backward_pass_makes_isnt_held_before(name, monkeypatch):
    module, block = BLOCKS[name]
    with_it = temporary_bytes(block)
    monkeypatch.setattr(module, "late", lambda x, after: x)
    jax.clear_caches()
    without = temporary_bytes(block)
    assert with_it < 0.9 * without
