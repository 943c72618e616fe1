"""Attention of single new tokens to a cache in parts, of which those are read that hold something.

A cache has room for all tokens that are to come. Attention to it as a whole reads the room, too: on average over a text
from an empty one, twice what is there; with one query a row, reading is all that it does.

Shapes: B batch, S key position, P slots of a part, N query heads, K key/value heads, G = N / K queries a key/value
head, H head width.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from lm.nn.attention import AttentionMask
from lm.nn.layers import Dropout
from lm.nn.matmul import Numerics, product

Array = jax.Array


def attend_filled(
    q_B1NH: Array,
    k_parts: tuple[Array, ...],
    v_parts: tuple[Array, ...],
    mask: AttentionMask,
    *,
    scale: float,
    softcap: float | None,
    numerics: Numerics,
    dropout: Dropout | None,
    bias_NTS: Array | None = None,
) -> Array:
    """`lm.nn.attention.attend` of one query a row, which sees no key of an index above mask.query_offset, its own.

    Args:
      k_parts, v_parts: each [B, P, K, H], one after another. Of [B, K, P, H], transposed, they are read as they lie.

    Parts that begin behind the query aren't read.
    """
    assert dropout is None and mask.causal and q_B1NH.shape[1] == 1, "one token of decoding"
    B, _, N, H = q_B1NH.shape
    K = k_parts[0].shape[2]
    G, S = N // K, sum(k_BPKH.shape[1] for k_BPKH in k_parts)
    q_BKGH = q_B1NH.reshape(B, K, G, H)

    def scores(q_BKGH: Array, k_BKPH: Array) -> Array:
        return scale * product(q_BKGH, k_BKPH, True, numerics)

    def weighted(e_BKGP: Array, v_BKPH: Array) -> Array:
        return product(e_BKGP, v_BKPH, False, numerics)

    found, at = [], 0
    for k_BPKH in k_parts:
        found.append(_if_filled(scores, at, mask, q_BKGH, k_BPKH.transpose(0, 2, 1, 3)))
        at += k_BPKH.shape[1]
    scores_BKGS = jnp.concatenate(found, axis=-1)
    if bias_NTS is not None:
        scores_BKGS += bias_NTS.reshape(1, K, G, S)
    if softcap is not None:
        scores_BKGS = softcap * jnp.tanh(scores_BKGS / softcap)
    allowed_B1S = mask.dense(1, S)
    assert allowed_B1S is not None
    scores_BKGS = jnp.where(allowed_B1S[:, None], scores_BKGS, -1e30)
    e_BKGS = jnp.exp(scores_BKGS - jnp.max(scores_BKGS, axis=-1, keepdims=True))
    o_BKGH, at = jnp.zeros((B, K, G, H)), 0
    for v_BPKH in v_parts:
        e_BKGP = lax.slice_in_dim(e_BKGS, at, at + v_BPKH.shape[1], axis=-1)
        o_BKGH += _if_filled(weighted, at, mask, e_BKGP, v_BPKH.transpose(0, 2, 1, 3))
        at += v_BPKH.shape[1]
    o_BKGH = o_BKGH / jnp.sum(e_BKGS, axis=-1, keepdims=True)
    return o_BKGH.reshape(B, 1, N, H).astype(q_B1NH.dtype)


def _if_filled(
    compute: Callable[[Array, Array], Array], at: int, mask: AttentionMask, x: Array, part_BKPH: Array
) -> Array:
    """`compute` of x and a part that begins with slot `at`, or where the query is before that, zeros."""
    shape = jax.eval_shape(compute, x, part_BKPH)
    return lax.cond(
        mask.query_offset >= at, compute, lambda x, part_BKPH: jnp.zeros(shape.shape, shape.dtype), x, part_BKPH
    )
