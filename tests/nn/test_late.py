"""What the backward pass makes of what was kept: the same numbers, and not before it is there."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.nn import activations, attention, matmul, norms
from lm.nn.attention import AttentionMask
from lm.nn.late import again, late
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


def test_the_backward_pass_of_gelu_holds_its_argument_alone():
    def formula(x):
        wide = x.astype(jnp.float32)
        return (0.5 * wide * (1 + jax.lax.erf(wide / 2**0.5))).astype(x.dtype)

    assert temporary_bytes(activations.gelu) < 0.9 * temporary_bytes(formula)


def test_weights_are_cast_again(monkeypatch):
    """Of residual blocks with large matrices, in bfloat16. XLA puts some of what it holds where gradients will be."""
    width, hidden = 512, 2048
    assert width * hidden >= matmul.LEAST_CAST_AGAIN

    def loss(x, ws):
        for up, down in ws:
            hidden_BF = jax.nn.relu(project(x, up, None, inputs=1, numerics=BFLOAT16))
            x = x + project(hidden_BF, down, None, inputs=1, numerics=BFLOAT16)
        return jnp.sum(x.astype(jnp.float32) ** 2)

    def temporary():
        up, down = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((width, hidden), (hidden, width)))
        shapes = jax.ShapeDtypeStruct((256, width), jnp.bfloat16), [(up, down)] * 6
        gradient = jax.jit(jax.grad(loss, argnums=1))
        return gradient.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    with_it = temporary()
    monkeypatch.setattr(matmul, "late", lambda x, after: x)
    jax.clear_caches()
    assert with_it < 0.7 * temporary()


def test_slices_of_stacked_weights_arent_copied():
    """As they are with a barrier by jax 0.12, for as long as the layers go."""
    layers, width = 6, 1024
    assert width * width >= matmul.LEAST_CAST_AGAIN

    def loss(x, w_LDD, v_LDD):
        for w, v in zip(w_LDD, v_LDD, strict=True):
            hidden = jax.nn.relu(project(x, w, None, inputs=1, numerics=BFLOAT16))
            x = x + project(hidden, v, None, inputs=1, numerics=BFLOAT16)
        return jnp.sum(x.astype(jnp.float32) ** 2)

    stack = jax.ShapeDtypeStruct((layers, width, width), jnp.float32)
    x = jax.ShapeDtypeStruct((64, width), jnp.bfloat16)
    compiled = jax.jit(jax.grad(loss, argnums=(1, 2))).lower(x, stack, stack).compile()
    gradients = 2 * 4 * layers * width**2
    assert compiled.memory_analysis().temp_size_in_bytes < 1.1 * gradients


def exponential_sums(x, w):
    """Differentiable in both, and with something large to keep for it."""
    return jnp.sum(jnp.exp(x[:, :, None] * w[:, None, :] * jnp.arange(512.0)[None, :, None]), axis=-1)


def test_made_again_it_is_the_same():
    x, w = (jax.random.normal(key, (3, 512)) * 1e-3 for key in jax.random.split(jax.random.key(0)))

    def results(form):
        return jax.jit(jax.value_and_grad(lambda x, w: jnp.sum(form(x, w) ** 2), argnums=(0, 1)))(x, w)

    got, wanted = results(lambda x, w: again(exponential_sums, x, w)), results(exponential_sums)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_what_is_made_again_isnt_kept():
    def temporary(form):
        def loss(x, w):
            for _ in range(LAYERS):
                x = x + 1e-3 * form(x, w)
            return jnp.sum(x)

        shapes = [jax.ShapeDtypeStruct((3, 512), jnp.float32)] * 2
        return jax.jit(jax.grad(loss)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporary(lambda x, w: again(exponential_sums, x, w)) < 0.5 * temporary(exponential_sums)
