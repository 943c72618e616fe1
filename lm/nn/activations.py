"""The nonlinearities of the feed-forward block."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lm.nn.late import late

Array = jax.Array


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """x Φ(x), exact, in x's dtype (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""
    wide, phi = _phi(x)
    return (wide * phi).astype(x.dtype)


def _phi(x: Array) -> tuple[Array, Array]:
    wide = x.astype(jnp.float32)  # float32: 1 + erf(x) loses what x is in bfloat16
    return wide, 0.5 * (1.0 + jax.lax.erf(wide * math.sqrt(0.5)))


def _gelu_backward(x: Array, g: Array) -> tuple[Array]:
    """The slope, Φ(x) + x φ(x), from x alone."""
    wide, phi = _phi(late(x, g))
    slope = phi + wide * jnp.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    return (g * slope.astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021, arXiv:2109.08668
    "swiglu": jax.nn.silu,  # of the gate, as the next: Shazeer 2020, arXiv:2002.05202
    "geglu": lambda x: jax.nn.gelu(x, approximate=True),
}
