"""The nonlinearities of the feed-forward block."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """x Φ(x), exact, in x's dtype (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""
    return _gelu_forward(x)[0]


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    """The value, and the slope Φ(x) + x φ(x), which is all that the backward pass reads."""
    wide = x.astype(jnp.float32)  # float32: 1 + erf(x) loses what x is in bfloat16
    phi = 0.5 * (1.0 + jax.lax.erf(wide * math.sqrt(0.5)))
    slope = phi + wide * jnp.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    return (wide * phi).astype(x.dtype), slope.astype(x.dtype)


def _gelu_backward(slope: Array, g: Array) -> tuple[Array]:
    return (g * slope,)


gelu.defvjp(_gelu_forward, _gelu_backward)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021, arXiv:2109.08668
    "swiglu": jax.nn.silu,  # of the gate, as the next: Shazeer 2020, arXiv:2002.05202
    "geglu": lambda x: jax.nn.gelu(x, approximate=True),
}
