"""The order in which a backward pass is computed, and what is computed again in it."""

from __future__ import annotations

from collections.abc import Callable

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


def again(compute: Callable[..., Array], *args: Array) -> Array:
    """compute(*args), of which the backward pass keeps the arguments alone: it makes the rest again, when it is there.

    `jax.checkpoint` does that by barriers, which on CPUs are gone when instructions are put in order.

    Args:
      compute: differentiable, of arrays whose first axis is that of the result.
    """

    @jax.custom_vjp
    def run(*args: Array) -> Array:
        return compute(*args)

    def backward(kept: tuple[Array, ...], g: Array) -> tuple[Array, ...]:
        first = lax.slice(g, (0,) * g.ndim, (g.shape[0], *(1,) * (g.ndim - 1)))
        _, gradients = jax.vjp(compute, *(late(x, first.reshape(-1, *(1,) * (x.ndim - 1))) for x in kept))
        return gradients(g)

    run.defvjp(lambda *args: (compute(*args), args), backward)
    return run(*args)
