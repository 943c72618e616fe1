"""The mixed-precision contract of every matrix product.

Operands are cast to the compute dtype, sums are kept in float32, forward and in both gradients. JAX's own transpose
rule would promote the operands of the backward pass to its cotangent's float32; here the cotangent is cast instead.

Shapes: Z any batch axes, M rows, K contracted, N columns.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lm.nn.late import late

Array = jax.Array
LANES = 8
"""A CPU turns a matrix fast, in pieces as wide, if its columns are a multiple of this."""
LEAST_SHARED = 2**18
"""Numbers of a matrix from which threads share its product: fewer take less time than the threads' meeting."""
LEAST_CAST_AGAIN = 2**20
"""Numbers of a matrix from which a CPU casts it again in the backward pass, not to hold two bytes a parameter since the
forward pass. Of smaller ones the time would tell."""


class Numerics(NamedTuple):
    """How products are computed: dtype of the operands, and XLA's precision for them."""

    dtype: str
    precision: lax.Precision


def numerics(compute_dtype: str) -> Numerics:
    """The numerics of a `model.compute_dtype`.

    float32 asks for HIGHEST, since XLA's default computes float32 products in bfloat16 on TPU and in TF32 on GPUs;
    tensorfloat32 asks for just that on GPUs (three bfloat16 passes on TPU).
    """
    return {
        "float32": Numerics("float32", lax.Precision.HIGHEST),
        "tensorfloat32": Numerics("float32", lax.Precision.HIGH),
        "bfloat16": Numerics("bfloat16", lax.Precision.DEFAULT),
    }[compute_dtype]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(x_ZMK: Array, w: Array, transpose_w: bool, numerics: Numerics) -> Array:
    """x · w over the last axis of x, batched over all axes before the last two.

    Args:
      x_ZMK: [..., M, K].
      w: [..., K, N], or [..., N, K] if `transpose_w`, with the same batch axes.
      numerics: dtype of the operands. The sums, and so the result, are float32.

    Returns:
      [..., M, N], float32.
    """
    contracted = w.ndim - 1 if transpose_w else w.ndim - 2
    return _dot(x_ZMK, w, x_ZMK.ndim - 1, contracted, numerics)


def _product_forward(x: Array, w: Array, transpose_w: bool, numerics: Numerics) -> tuple[Array, tuple[Array, Array]]:
    return product(x, w, transpose_w, numerics), (x, w)


def _product_backward(
    transpose_w: bool, numerics: Numerics, saved: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    x, w = saved
    dw = sum_of_rows(g, x, numerics) if transpose_w else sum_of_rows(x, g, numerics)
    if w.dtype != numerics.dtype and w.size >= LEAST_CAST_AGAIN:
        w = lax.platform_dependent(w, dw, cpu=late, default=lambda w, dw: w)
    dx = product(g, w, not transpose_w, numerics)
    return dx.astype(x.dtype), dw.astype(w.dtype)


product.defvjp(_product_forward, _product_backward)


def sum_of_rows(x_ZMK: Array, y_ZMN: Array, numerics: Numerics) -> Array:
    """xᵀ · y, Σ over rows of x_K ⊗ y_N, [..., K, N], float32: the gradient of a product's matrix."""
    rows = x_ZMK.ndim - 2

    def in_place(x: Array, y: Array) -> Array:
        return _dot(x, y, rows, rows, numerics)

    def turned(x: Array, y: Array) -> Array:
        return _dot(_turned(x.astype(numerics.dtype)), y, rows + 1, rows, numerics)

    if numerics.dtype != "bfloat16" or x_ZMK.shape[-1] % LANES:
        return in_place(x_ZMK, y_ZMN)
    # XLA's fast bfloat16 product on CPUs doesn't contract rows: 150 GFLOP/s become 350, the transpose included.
    return lax.platform_dependent(x_ZMK, y_ZMN, cpu=turned, default=in_place)


def _turned(x_ZMK: Array) -> Array:
    """xᵀ, [..., K, M], by way of a reshape: XLA folds a plain transpose back into the product."""
    *Z, M, K = x_ZMK.shape
    z = len(Z)
    pieces = x_ZMK.reshape(*Z, M, K // LANES, LANES)
    return pieces.transpose(*range(z), z + 1, z + 2, z).reshape(*Z, K, M)


def heads_first(x_BTNH: Array, numerics: Numerics, *, queries: int) -> Array:
    """x_BNTH, as products over each head's positions want it; its own inverse.

    On CPUs by way of a reshape, as `_turned`: XLA folds a plain transpose into the product, and has no bfloat16 for one
    of that form. It would compute all of attention in float32, at a third of the speed and less. A single query's keys
    come from a cache where they lie so already: two plain transposes are none.
    """
    B, T, N, H = x_BTNH.shape
    halves = 2

    def apart(x: Array) -> Array:
        pieces = x.reshape(B, T, N, halves, H // halves)
        return pieces.transpose(0, 2, 1, 3, 4).reshape(B, N, T, H)

    def plain(x: Array) -> Array:
        return x.transpose(0, 2, 1, 3)

    if numerics.dtype != "bfloat16" or H % halves or halves == H or 1 in (T, N, queries):
        return plain(x_BTNH)
    return lax.platform_dependent(x_BTNH, cpu=apart, default=plain)


@jax.tree_util.register_pytree_node_class
class Turned:
    """A matrix [*K, *N] laid out for products with few rows on a CPU: columns in shares, one after another.

    Decoding is as fast as the weights are read. XLA runs a batch of products in parallel, and one whose left operand
    has its inputs side by side without a copy of it. On two cores, sixteen float32 rows: 45 to 24 ms for 226 MB.

    w_CnK: shares, columns of a share, inputs. shape: [*K, *N].
    """

    def __init__(self, w_CnK: Array, shape: tuple[int, ...]):
        self.w_CnK, self.shape = w_CnK, shape

    @classmethod
    def of(cls, w: Array, *, inputs: int, shares: int) -> Turned:
        """Of a matrix [*K, *N]; fewer shares where they don't divide its columns, one where it is small."""
        width = math.prod(w.shape[:inputs])
        columns = math.prod(w.shape[inputs:])
        shares = math.gcd(shares, columns) if width * columns >= LEAST_SHARED else 1
        return cls(w.reshape(width, columns).T.reshape(shares, -1, width), w.shape)

    def product(self, x_MK: Array, numerics: Numerics) -> Array:
        """x · w, [M, N], float32."""
        C, n, K = self.w_CnK.shape
        M = x_MK.shape[0]
        if M == 1 and self.w_CnK.dtype == jnp.bfloat16:  # of one row XLA's CPU back end makes it in float32
            return self.product(jnp.broadcast_to(x_MK, (2, K)), numerics)[:1]
        if M == 1:  # reads memory as fast as it goes
            return _dot(x_MK, self.w_CnK.reshape(C * n, K), 1, 1, numerics)
        y_CnM = _dot(self.w_CnK, jnp.broadcast_to(x_MK, (C, M, K)), 2, 2, numerics)
        if C == 1 and n * K >= LEAST_SHARED:  # else XLA swaps the operands for the turn, and takes 1.6 times as long
            y_CnM = lax.optimization_barrier(y_CnM)
        return y_CnM.reshape(C * n, M).T

    def tree_flatten(self) -> tuple[tuple[Array], tuple[int, ...]]:
        return (self.w_CnK,), self.shape

    @classmethod
    def tree_unflatten(cls, shape: tuple[int, ...], leaves: tuple[Array]) -> Turned:
        return cls(*leaves, shape)


def project(x: Array, w: Array | Turned, bias: Array | None, *, inputs: int, numerics: Numerics) -> Array:
    """A linear layer: contracts the last `inputs` axes of x with the first ones of w, adds the bias in float32.

    Args:
      x: [..., *K], the leading axes being rows.
      w: [*K, *N], float32 parameters.
      bias: [*N] or None.

    Returns:
      [..., *N] in the compute dtype.
    """
    rows, columns = x.shape[: x.ndim - inputs], w.shape[inputs:]
    width = math.prod(w.shape[:inputs])
    x_MK = x.reshape(math.prod(rows), width)
    if isinstance(w, Turned):
        y = w.product(x_MK, numerics)
    else:
        y = product(x_MK, w.reshape(width, math.prod(columns)), False, numerics)
    y = y.reshape(*rows, *columns)
    if bias is not None:
        y = y + bias.reshape((1,) * len(rows) + bias.shape)
    return y.astype(numerics.dtype)


def _dot(x: Array, y: Array, x_axis: int, y_axis: int, numerics: Numerics) -> Array:
    batch = tuple(range(x.ndim - 2))
    return lax.dot_general(
        x.astype(numerics.dtype),
        y.astype(numerics.dtype),
        (((x_axis,), (y_axis,)), (batch, batch)),
        precision=numerics.precision,
        preferred_element_type=jnp.float32,
    )
