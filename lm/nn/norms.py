"""LayerNorm and RMSNorm. Each has its own backward pass, which keeps x and a number a row, and recomputes the rest.

Without it XLA's CPU back end computes the norm again inside every product that reads its gradient.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lm.nn import params as declare
from lm.nn.late import late
from lm.nn.params import ParamSpec

Array = jax.Array


def norm_specs(width: int, *, kind: str, bias: bool, offset: bool) -> dict[str, ParamSpec]:
    """`offset`: as in `rms_norm`; either way the norm is drawn as the one that multiplies by 1."""
    specs = {"scale": ParamSpec((width,), ("norm",), declare.zeros if offset else declare.ones)}
    if kind == "layernorm" and bias:
        specs["bias"] = ParamSpec((width,), ("norm",), declare.zeros)
    return specs


def norm(params: dict[str, Any], x_BTD: Array, *, kind: str, epsilon: float, offset: bool) -> Array:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019), as `kind` says, in x's dtype."""
    if kind == "rmsnorm":
        return rms_norm(x_BTD, params["scale"], epsilon=epsilon, offset=offset)
    assert not offset, "LayerNorm has no offset"
    return layer_norm(x_BTD, params["scale"], params.get("bias"), epsilon=epsilon)


def rms_norm(x: Array, scale: Array, *, epsilon: float, offset: bool) -> Array:
    """x / sqrt(mean(x²) + epsilon) · scale over the last axis; with `offset` · (1 + scale), as in Gemma."""
    return _rms_norm(x, scale, epsilon, offset)


def layer_norm(x: Array, scale: Array, bias: Array | None, *, epsilon: float) -> Array:
    """(x - mean) / sqrt(var + epsilon) · scale + bias over the last axis."""
    return _layer_norm(x, scale, bias, epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _rms_norm(x: Array, scale: Array, epsilon: float, offset: bool) -> Array:
    return _rms_forward(x, scale, epsilon, offset)[0]


def _rms_forward(x: Array, scale: Array, epsilon: float, offset: bool) -> tuple[Array, tuple[Array, Array, Array]]:
    wide = x.astype(jnp.float32)  # float32: a mean of squares over the width loses its digits in bfloat16
    shrink = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * shrink * _gain(scale, x.ndim, offset)).astype(x.dtype), (x, scale, shrink)


def _rms_backward(epsilon: float, offset: bool, saved: tuple[Array, Array, Array], g: Array) -> tuple[Array, Array]:
    """Of y = gain · h with h = x · shrink: dx = shrink (gain g - h mean(gain g h))."""
    x, scale, shrink = saved
    h, g = late(x, g).astype(jnp.float32) * shrink, g.astype(jnp.float32)
    dh = g * _gain(scale, x.ndim, offset)
    dx = shrink * (dh - h * jnp.mean(dh * h, axis=-1, keepdims=True))
    return dx.astype(x.dtype), _over_rows(g * h).astype(scale.dtype)


_rms_norm.defvjp(_rms_forward, _rms_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _layer_norm(x: Array, scale: Array, bias: Array | None, epsilon: float) -> Array:
    return _layer_forward(x, scale, bias, epsilon)[0]


def _layer_forward(x: Array, scale: Array, bias: Array | None, epsilon: float) -> tuple[Array, tuple]:
    wide = x.astype(jnp.float32)  # float32: as in RMSNorm
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide - mean
    shrink = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    y = wide * shrink * _gain(scale, x.ndim, False)
    if bias is not None:
        y = y + _gain(bias, x.ndim, False)
    return y.astype(x.dtype), (x, scale, bias, mean, shrink)


def _layer_backward(epsilon: float, saved: tuple, g: Array) -> tuple[Array, Array, Array | None]:
    """Of y = scale · h + bias with h = (x - mean) · shrink: dh = scale g, dx = shrink (dh - mean dh - h mean(dh h))."""
    x, scale, bias, mean, shrink = saved
    h, g = (late(x, g).astype(jnp.float32) - mean) * shrink, g.astype(jnp.float32)
    dh = g * _gain(scale, x.ndim, False)
    dx = shrink * (dh - jnp.mean(dh, axis=-1, keepdims=True) - h * jnp.mean(dh * h, axis=-1, keepdims=True))
    dbias = None if bias is None else _over_rows(g).astype(bias.dtype)
    return dx.astype(x.dtype), _over_rows(g * h).astype(scale.dtype), dbias


_layer_norm.defvjp(_layer_forward, _layer_backward)


def _gain(scale: Array, ndim: int, offset: bool) -> Array:
    return (1.0 + scale if offset else scale).reshape((1,) * (ndim - 1) + scale.shape)


def _over_rows(x: Array) -> Array:
    return jnp.sum(x, axis=tuple(range(x.ndim - 1)))
