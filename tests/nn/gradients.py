"""Holds a backward pass of our own against JAX's, of the formula."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}
"""Of the largest entry: another order of sums; 8 bits of mantissa, rounded at other places."""


def assert_gradients_equal(ours, formula, *arguments):
    """Value and gradients, of a random projection of the result; the first argument's dtype is the tolerance's."""

    def both(function):
        @jax.jit
        def run(*arguments):
            y, pull = jax.vjp(function, *arguments)
            leaves, tree = jax.tree.flatten(y)
            g = [jax.random.normal(jax.random.key(i), leaf.shape, leaf.dtype) for i, leaf in enumerate(leaves, 7)]
            return y, pull(jax.tree.unflatten(tree, g))

        return run(*arguments)

    tolerance = TOLERANCES[str(arguments[0].dtype)]
    for a, b in zip(jax.tree.leaves(both(ours)), jax.tree.leaves(both(formula)), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        b = b.astype(jnp.float32)
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=tolerance * float(jnp.abs(b).max()), rtol=0)
