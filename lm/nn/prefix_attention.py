"""Causal attention in blocks of queries, each against the keys up to its own end: half of the scores are never made.

Shapes: B batch, T query position, S key position, N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lm.nn.attention import AttentionMask, attend
from lm.nn.late import again
from lm.nn.layers import Dropout
from lm.nn.matmul import Numerics

Array = jax.Array
BLOCK = 128
KEPT = 256
"""Tokens up to which the backward pass keeps probabilities, and of keys and values a copy a block. Of longer rows it
makes them again: of a step of GPT-2 at 512 tokens they are a seventh of the memory, and a hundredth of the time."""


def attend_prefix(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    mask: AttentionMask,
    *,
    scale: float,
    softcap: float | None,
    numerics: Numerics,
    dropout: Dropout | None,
    bias_NTS: Array | None = None,
) -> Array:
    """`lm.nn.attention.attend`, to its numbers but for the order of summation.

    It has no dropout: the reference draws its mask for [T, S] whole. Without causality, or with an offset that is known
    only when the program runs, it is the reference.
    """
    assert dropout is None and bias_NTS is None, "prefix attention has no dropout on probabilities and no bias"
    T, S, offset = q_BTNH.shape[1], k_BSKH.shape[1], mask.query_offset
    one = functools.partial(attend, scale=scale, softcap=softcap, numerics=numerics, dropout=None)
    if not mask.causal or not isinstance(offset, int):
        return one(q_BTNH, k_BSKH, v_BSKH, mask)

    def in_blocks(
        q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, query_segments_BT: Array | None, key_segments_BS: Array | None
    ) -> Array:
        queries = [slice(begin, min(begin + BLOCK, T)) for begin in range(0, T, BLOCK)]
        keys = []
        for own in queries:
            first = 0 if mask.window is None else min(max(offset + own.start - mask.window + 1, 0), S - 1)
            keys.append(slice(first, max(min(offset + own.stop, S), first + 1)))
        masks = [
            mask._replace(
                query_segments_BT=None if query_segments_BT is None else query_segments_BT[:, own],
                key_segments_BS=None if key_segments_BS is None else key_segments_BS[:, seen],
                query_offset=offset + own.start - seen.start,
            )
            for own, seen in zip(queries, keys, strict=True)
        ]
        parts = _parts(q_BTNH, queries), _parts(k_BSKH, keys), _parts(v_BSKH, keys), masks
        blocks = [one(*each) for each in zip(*parts, strict=True)]
        return jnp.concatenate(blocks, axis=1)

    compute = in_blocks if T <= KEPT else functools.partial(again, in_blocks)
    return compute(q_BTNH, k_BSKH, v_BSKH, mask.query_segments_BT, mask.key_segments_BS)


def _parts(x_BS: Array, ranges: Sequence[slice]) -> list[Array]:
    """x[:, range] of each, of an x [B, S, ...].

    Of more than two the gradients are summed piece by piece, between one bound and the next. XLA would pad each to the
    whole and add those, and take a twentieth of a step of GPT-2 for it. Of two it takes no longer than the pieces.
    """
    if len(ranges) <= 2:
        return [x_BS[:, each] for each in ranges]
    bounds = sorted({0, x_BS.shape[1]}.union(*((each.start, each.stop) for each in ranges)))
    pieces = jnp.split(x_BS, bounds[1:-1], axis=1)
    inside = [slice(bounds.index(each.start), bounds.index(each.stop)) for each in ranges]
    return [jnp.concatenate(pieces[each], axis=1) for each in inside]
