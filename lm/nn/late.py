"""The order in which a program is computed, and what of it is computed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def late(x: Array, after: Array) -> Array:
    """x, for what is to be computed of it, and not before `after` is known, which broadcasts to the shape of x.

    Of what the forward pass kept, XLA would compute whatever follows from that alone at once, and hold it until the
    backward pass gets there. A barrier keeps it from that on GPUs and TPUs. On CPUs barriers are gone when instructions
    are put in order; there 0 · after is added, which nothing simplifies, since it is NaN where `after` isn't finite. A
    gradient that isn't finite is lost anyway. What is narrow has a barrier there too, or it would be kept as it was in
    float32; what is float32 has none: before one XLA makes a copy of each layer's slice of the stacked weights.
    """

    def on_cpu(x: Array, after: Array) -> Array:
        kept = x if x.dtype == jnp.float32 else lax.optimization_barrier(x)
        return kept + (0.0 * after).astype(x.dtype)

    return lax.platform_dependent(
        x, after, cpu=on_cpu, default=lambda x, after: lax.optimization_barrier((x, after))[0]
    )


def written(tree: Any) -> Any:
    """The arrays as they lie, on CPUs: computed by themselves, and not again by their readers. GPUs and TPUs do both in
    one pass."""
    return lax.platform_dependent(tree, cpu=lax.optimization_barrier, default=lambda same: same)


def again(compute: Callable[..., Array], *args: Any) -> Array:
    """compute(*args), of which the backward pass keeps the arguments alone: it makes the rest again, when it is there.

    `jax.checkpoint` does that by barriers, which on CPUs are gone when instructions are put in order.

    Args:
      compute: differentiable; whatever is traced comes to it as an argument, not by closure.
      args: arrays whose first axis is that of the result, or None. Those of whole numbers have no gradient.
    """

    @jax.custom_vjp
    def run(*args: Any) -> Array:
        return compute(*args)

    def backward(kept: tuple[Any, ...], g: Array) -> tuple[Any, ...]:
        first = lax.slice(g, (0,) * g.ndim, (g.shape[0], *(1,) * (g.ndim - 1)))

        def ready(x: Array) -> Array:
            floating = jnp.issubdtype(x.dtype, jnp.floating)
            return late(x, first.reshape(-1, *(1,) * (x.ndim - 1))) if floating else x

        _, gradients = jax.vjp(compute, *jax.tree.map(ready, kept))
        return gradients(g)

    run.defvjp(lambda *args: (compute(*args), args), backward)
    return run(*args)
