"""The order in which a backward pass is computed."""

from __future__ import annotations

import jax
from jax import lax

Array = jax.Array


def late(x: Array, after: Array) -> Array:
    """x, for what is to be computed of it, and not before `after` is known, which broadcasts to the shape of x.

    Of what the forward pass kept, XLA would compute whatever follows from that alone at once, and hold it until the
    backward pass gets there. A barrier keeps it from that on GPUs and TPUs. On CPUs barriers are gone when instructions
    are put in order (but not yet when it would keep in float32 what it is given in bfloat16); there 0 · after is added,
    which nothing simplifies, since it is NaN where `after` isn't finite. A gradient that isn't finite is lost anyway.
    """
    return lax.platform_dependent(
        x,
        after,
        cpu=lambda x, after: lax.optimization_barrier(x) + (0.0 * after).astype(x.dtype),
        default=lambda x, after: lax.optimization_barrier((x, after))[0],
    )
