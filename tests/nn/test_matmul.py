"""The matmul contract: operands in the compute dtype, sums in float32, in both passes, at any size."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.nn.matmul import numerics, product, project

SIZES = (1, 3, 65, 127)


def operands(shape_x, shape_w, seed=0):
    a, b = jax.random.split(jax.random.key(seed))
    return jax.random.normal(a, shape_x), jax.random.normal(b, shape_w)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "tensorfloat32"])
@pytest.mark.parametrize("transpose_w", [False, True])
def test_odd_sizes_run_and_equal_float64(dtype, transpose_w):
    """Executed, not just compiled: XLA's CPU back end has refused some bfloat16 products only at run time."""
    for M, K, N in itertools.product(SIZES, repeat=3):
        x, w = operands((M, K), (N, K) if transpose_w else (K, N))
        g = operands((M, N), (1,), seed=1)[0]
        y, pull = jax.jit(lambda x, w: jax.vjp(lambda x, w: product(x, w, transpose_w, numerics(dtype)), x, w))(x, w)
        dx, dw = jax.jit(pull)(g)
        x, w, g = (np.asarray(v.astype(numerics(dtype).dtype), np.float64) for v in (x, w, g))
        w = w.T if transpose_w else w
        dw = dw.T if transpose_w else dw
        assert y.dtype == dx.dtype == dw.dtype == jnp.float32
        # float32 sums of up to 127 products of size one, whatever the operands' dtype: some units in the last place
        for got, wanted in ((y, x @ w), (dx, g @ w.T), (dw, x.T @ g)):
            np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batched_product_and_its_gradients(dtype):
    x, w = operands((2, 3, 5, 7), (2, 3, 11, 7))
    y, pull = jax.vjp(lambda x, w: product(x, w, True, numerics(dtype)), x, w)
    dx, dw = pull(jnp.ones_like(y))
    x, w = (np.asarray(v.astype(dtype), np.float64) for v in (x, w))
    np.testing.assert_allclose(y, np.einsum("abmk,abnk->abmn", x, w), atol=1e-5)
    np.testing.assert_allclose(dx, np.broadcast_to(w.sum(2, keepdims=True), x.shape), atol=1e-5)
    np.testing.assert_allclose(dw, np.broadcast_to(x.sum(2, keepdims=True), w.shape), atol=1e-5)


def test_backward_pass_keeps_operands_in_bfloat16():
    """JAX's own rule would promote both operands to the cotangent's float32."""
    x, w = operands((16, 16), (16, 16))

    def loss(dot):
        return lambda x, w: jnp.sum(dot(x, w) ** 2)

    def float32_dots(dot):
        text = jax.jit(jax.grad(loss(dot), argnums=(0, 1))).lower(x, w).as_text()
        dots = [line for line in text.splitlines() if "dot_general" in line]
        assert len(dots) == 3
        return [line for line in dots if "(tensor<16x16xf32>, tensor<16x16xf32>)" in line]

    def plain(x, w):
        return jax.lax.dot(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), preferred_element_type=jnp.float32)

    assert not float32_dots(lambda x, w: product(x, w, False, numerics("bfloat16")))
    assert float32_dots(plain), "if JAX no longer promotes, our own rule can go"


def test_project_contracts_several_axes_and_adds_bias():
    x, w = operands((2, 3, 4, 5), (4, 5, 6, 7))
    bias = operands((6, 7), (1,), seed=2)[0]
    y = project(x, w, bias, inputs=2, numerics=numerics("float32"))
    np.testing.assert_allclose(y, np.einsum("abnh,nhij->abij", x, w) + np.asarray(bias), atol=1e-5)
    assert project(x, w, bias, inputs=2, numerics=numerics("bfloat16")).dtype == jnp.bfloat16
