"""The matmul contract: operands in the compute dtype, sums in float32, in both passes, at any size."""

from __future__ import annotations

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.nn.attention import AttentionMask, attend
from lm.nn.matmul import Turned, heads_first, numerics, product, project, sum_of_rows

SIZES = (1, 3, 65, 127)


def operands(shape_x, shape_w, seed=0):
    a, b = jax.random.split(jax.random.key(seed))
    return jax.random.normal(a, shape_x), jax.random.normal(b, shape_w)


@functools.partial(jax.jit, static_argnums=(1, 2))
def values_and_gradients(problems, transpose_w, dtype):
    """(y, dx, dw) of every (x, w, g), in one program."""
    found = []
    for x, w, g in problems:
        y, pull = jax.vjp(lambda x, w: product(x, w, transpose_w, numerics(dtype)), x, w)
        found.append((y, *pull(g)))
    return found


def check(shapes, transpose_w, dtype, batch=()):
    """Products of every (M, K, N), and both gradients, against NumPy in float64.

    float32 sums of up to 127 products of size one, whatever the operands' dtype: some units in the last place.
    """
    problems = []
    for M, K, N in shapes:
        x, w = operands((*batch, M, K), (*batch, *((N, K) if transpose_w else (K, N))))
        problems.append((x, w, operands((*batch, M, N), (1,), seed=1)[0]))
    for shape, problem, found in zip(shapes, problems, values_and_gradients(problems, transpose_w, dtype), strict=True):
        x, w, g = (np.asarray(v.astype(numerics(dtype).dtype), np.float64) for v in problem)
        y, dx, dw = found
        assert y.dtype == dx.dtype == dw.dtype == jnp.float32
        if transpose_w:
            w, dw = w.swapaxes(-1, -2), dw.swapaxes(-1, -2)
        for got, wanted in ((y, x @ w), (dx, g @ w.swapaxes(-1, -2)), (dw, x.swapaxes(-1, -2) @ g)):
            np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=2e-5, err_msg=str(shape))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("transpose_w", [False, True])
def test_odd_sizes_run_and_equal_float64(dtype, transpose_w):
    """Executed, not just compiled: XLA's CPU back end has refused some bfloat16 products only at run time."""
    check(list(itertools.product(SIZES, repeat=3)), transpose_w, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "tensorfloat32"])
@pytest.mark.parametrize("transpose_w", [False, True])
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_widths_that_are_turned_run_and_equal_float64(dtype, transpose_w, batch):
    """`sum_of_rows` turns its first operand, x or for a transposed w g, in bfloat16 if it is a multiple of 8 wide."""
    widths = [(8, 3), (24, 65), (65, 24), (72, 8), (7, 11)]
    check([(M, *kn) for M in (1, 5, 127) for kn in widths], transpose_w, dtype, batch)


@pytest.mark.parametrize(
    ("dtype", "width", "turns"), [("bfloat16", 24, True), ("bfloat16", 20, False), ("float32", 24, False)]
)
def test_what_is_turned(dtype, width, turns):
    x, y = operands((5, width), (5, 3))
    text = jax.jit(lambda x, y: sum_of_rows(x, y, numerics(dtype))).lower(x, y).as_text()
    assert ("stablehlo.transpose" in text) == turns


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (2, 3, 5, 7), (2, 1, 5, 8), (2, 3, 1, 6), (1, 4, 4, 2)], ids=str)
def test_heads_first_is_a_transpose_and_its_own_inverse(shape, dtype):
    x = operands(shape, (1,))[0].astype(dtype)
    turn = jax.jit(functools.partial(heads_first, numerics=numerics(dtype), queries=4))
    np.testing.assert_array_equal(turn(x), x.transpose(0, 2, 1, 3))
    np.testing.assert_array_equal(turn(turn(x)), x)


def upcast(f, *arguments):
    """The products in the gradient of f that XLA computes of float32 operands here."""
    loss = jax.grad(lambda *a: jnp.sum(f(*a).astype(jnp.float32) ** 2), argnums=tuple(range(len(arguments))))
    text = jax.jit(loss).lower(*arguments).compile().as_text()
    types = dict(re.findall(r"(%[\w.-]+) = (\w+)\[", text))
    products = re.findall(r" dot\((%[\w.-]+), (%[\w.-]+)\)", text)
    assert products
    return [names for names in products if "f32" in (types[names[0]], types[names[1]])]


def test_attention_is_computed_in_bfloat16():
    """A plain transpose of heads would be folded into its products, and these computed in float32."""
    bfloat16 = numerics("bfloat16")
    x_BTNH = jax.ShapeDtypeStruct((2, 64, 3, 32), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
    if upcast(lambda x, w: product(x, w, False, bfloat16), w, w):
        pytest.skip("XLA has no bfloat16 products on this CPU")

    def attention(turn):
        def run(q, k, v):
            scores = product(turn(q), turn(k), True, bfloat16)
            return turn(product(jax.nn.softmax(scores), turn(v), False, bfloat16).astype(jnp.bfloat16))

        return run

    assert upcast(attention(lambda x: x.transpose(0, 2, 1, 3)), x_BTNH, x_BTNH, x_BTNH)
    assert not upcast(attention(lambda x: heads_first(x, bfloat16, queries=64)), x_BTNH, x_BTNH, x_BTNH)
    whole = functools.partial(
        attend, mask=AttentionMask(True), scale=0.1, softcap=None, numerics=bfloat16, dropout=None
    )
    assert not upcast(whole, x_BTNH, x_BTNH, x_BTNH)


@pytest.mark.parametrize("stored, dtype", [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")])
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("shares", [1, 2])
def test_a_turned_matrix_gives_the_same_products(stored, dtype, rows, shares):
    x, w = operands((rows, 512), (512, 1024))
    y = jax.jit(lambda x, w: w.product(x, numerics(dtype)))(x, Turned.of(w.astype(stored), inputs=1, shares=shares))
    wanted = [np.asarray(v.astype(dtype), np.float64) for v in (x, w)]
    assert y.dtype == jnp.float32
    # unrounded where XLA has no bfloat16 product of one row: that of stored float32
    rounding = 0.3 if stored != dtype else 1e-4
    np.testing.assert_allclose(y, wanted[0] @ wanted[1], atol=rounding)
