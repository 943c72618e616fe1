"""Relative positions as a bias on attention scores, one learned number a head and bucket of distances.

Raffel et al. 2020, arXiv:1910.10683, section 2.1, with the buckets of T5's checkpoints.

Shapes: R buckets, N query heads, T queries, S keys, I = T + S - 1 distances between them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lm.nn.params import Initializer, ParamSpec

Array = jax.Array


def relative_spec(buckets: int, heads: int, *, init: Initializer) -> ParamSpec:
    """One table for all layers of a stack. It only shifts scores: to the optimizer it is a bias."""
    return ParamSpec((buckets, heads), ("buckets", "heads"), init)


def bucket_table(buckets: int, *, bidirectional: bool, max_distance: int) -> np.ndarray:
    """The bucket of each distance key - query from -max_distance to max_distance, which stand for all beyond them.

    Half of the buckets are of one distance each; the others grow with its logarithm up to `max_distance`, and the last
    has all that is farther. `bidirectional` halves them first: keys after the query have the second half. Else those
    have the bucket of distance 0.
    """
    one_side = buckets // 2 if bidirectional else buckets
    exact = one_side // 2
    away = np.arange(max_distance + 1)
    # float32, rounded at each operation: as T5 was trained, so that a distance where buckets meet falls where it did
    share = np.log(np.maximum(away, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        np.log(max_distance / exact)
    )
    far = exact + (share * np.float32(one_side - exact)).astype(np.int64)
    one = np.where(away < exact, away, np.minimum(far, one_side - 1))
    after = one[1:] + one_side if bidirectional else np.zeros_like(one[1:])
    return np.concatenate([one[::-1], after]).astype(np.int32)


def relative_bias(
    table_RN: Array, queries: int, keys: int, *, offset: Array | int, bidirectional: bool, max_distance: int
) -> Array:
    """bias_NTS, float32: of query t, whose index among the keys is `offset` + t, and key s the number of their
    distance's bucket.

    Counting by index equals counting by position: a piece is contiguous in its row, and others are masked.
    """
    T, S = queries, keys
    lookup = jnp.asarray(bucket_table(len(table_RN), bidirectional=bidirectional, max_distance=max_distance))
    distance_I = jnp.arange(T + S - 1) - (T - 1) - offset
    buckets_I = lookup[jnp.clip(distance_I, -max_distance, max_distance) + max_distance]
    bias_NI = jnp.take(table_RN, buckets_I, axis=0).astype(jnp.float32).T
    # Row t is the same numbers, t places on: a gather of T S entries would be summed one by one in the backward pass.
    N, L = bias_NI.shape[0], T + S
    round_NTL = jnp.broadcast_to(jnp.pad(bias_NI, ((0, 0), (0, 1)))[:, None], (N, T, L))
    return round_NTL.reshape(N, T * L)[:, : T * (L - 1)].reshape(N, T, L - 1)[:, :, T - 1 :]
