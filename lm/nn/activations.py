"""The nonlinearities of the feed-forward block."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lm.nn.exponential import exp2_below

Array = jax.Array


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """x Φ(x), exact, in x's dtype (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""
    wide = x.astype(jnp.float32)  # float32: 1 + erf(x) loses what x is in bfloat16
    return (wide * (0.5 * (1.0 + jax.lax.erf(wide * math.sqrt(0.5))))).astype(x.dtype)


def _gelu_backward(x: Array, g: Array) -> tuple[Array]:
    """The slope, Φ(x) + x φ(x), from x alone: to 4e-7, as erf has it, in half the time on a CPU.

    One exponential is enough: Φ(-u) = e^(-u²/2) q(1 / (1 + p u)) for u of 0 or more, with a polynomial q (the form of
    Abramowitz & Stegun 1964, 7.1.26; these numbers are of sixth degree, Φ to 1e-8).
    """
    wide = x.astype(jnp.float32)
    e = exp2_below(wide * wide * (-0.5 / math.log(2)), 0)
    t = 1.0 / (1.0 + 0.28 * jnp.abs(wide))
    t2 = t * t
    c = (0.11652095, 0.0674957, 0.26891282, -0.23699678, 0.38987607, -0.10580875)
    tail = t * ((c[0] + c[1] * t) + t2 * ((c[2] + c[3] * t) + t2 * (c[4] + c[5] * t))) * e
    slope = jnp.where(wide < 0, tail, 1.0 - tail) + wide * e / math.sqrt(2 * math.pi)
    return ((g.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021, arXiv:2109.08668
    "swiglu": jax.nn.silu,  # of the gate, as the next: Shazeer 2020, arXiv:2002.05202
    "geglu": lambda x: jax.nn.gelu(x, approximate=True),
}
