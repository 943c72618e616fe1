"""Causal attention whose softmax is shifted by each query's score of its own key, not by its greatest score.

Shapes: B batch, T position, N query heads, K key/value heads, G = N / K queries a key/value head, H head width,
V = H + 1, n queries of a block, M = G n rows of one key/value head's products, S keys of a block.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from lm.nn.attention import AttentionMask
from lm.nn.exponential import exp2_below
from lm.nn.layers import Dropout
from lm.nn.matmul import Numerics, heads_first, product
from lm.nn.prefix_attention import attend_prefix

Array = jax.Array
_Segments = tuple[Array | None, Array | None]
BELOW = 50
"""A query's exponential of its own key is 2^-50: there is room for one that is 2^145 times greater, and for values of
1e-15 before products with it vanish."""
MOST = 2.0**95
"""Of a query's sum of exponentials: float32 ends at 2^128, and they are multiplied by values, which may be 2^33."""


def attend_shifted(
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
    """`lm.nn.attention.attend`, to its numbers but for rounding.

    Any shift of its scores leaves a softmax as it is; the greatest is taken so that no exponential overflows, for which
    a row has to be made and read before it begins. A query sees its own key always, and in practice that score isn't
    far from the greatest. Shifted by it, blocks of keys need not know of each other, and scale, shift, exponential and
    mask are one pass over each. It is `attend_prefix` where a sum grows too great after all, which is found when the
    program runs, where a gradient is taken, with a cap on scores, and for other queries than the keys' own.
    """
    assert dropout is None and bias_NTS is None, "shifted attention has no dropout on probabilities and no bias"
    offset, T, S = mask.query_offset, q_BTNH.shape[1], k_BSKH.shape[1]
    prefix = functools.partial(attend_prefix, scale=scale, softcap=softcap, numerics=numerics, dropout=None)
    own = isinstance(offset, int) and offset == 0 and T == S
    if not (mask.causal and own) or softcap is not None:
        return prefix(q_BTNH, k_BSKH, v_BSKH, mask)

    def with_segments(segments: _Segments) -> AttentionMask:
        return mask._replace(query_segments_BT=segments[0], key_segments_BS=segments[1])

    @jax.custom_vjp
    def shifted(q: Array, k: Array, v: Array, segments: _Segments) -> Array:
        sums_BNTV = _sums(q, k, v, with_segments(segments), scale=scale, numerics=numerics)
        o_BNTH = (sums_BNTV[..., :-1] / sums_BNTV[..., -1:]).astype(q.dtype)
        return lax.cond(
            jnp.max(sums_BNTV[..., -1]) < MOST,  # NaN makes exponentials of 2^127
            lambda o, *_: heads_first(o, numerics, queries=T),
            lambda _, q, k, v, segments: prefix(q, k, v, with_segments(segments)),
            *(o_BNTH, q, k, v, segments),
        )

    def forward(
        q: Array, k: Array, v: Array, segments: _Segments
    ) -> tuple[Array, Callable[[Array], tuple[Array, ...]]]:
        return jax.vjp(lambda q, k, v: prefix(q, k, v, with_segments(segments)), q, k, v)

    shifted.defvjp(forward, lambda back, do: (*back(do), None))
    return shifted(q_BTNH, k_BSKH, v_BSKH, (mask.query_segments_BT, mask.key_segments_BS))


def _block(tokens: int) -> int:
    """Queries whose scores are made at once: small blocks make fewer that causality masks, but compile longer."""
    return 64 if tokens <= 512 else 128


def _sums(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, mask: AttentionMask, *, scale: float, numerics: Numerics
) -> Array:
    """Over the keys a query sees, of its exponentials times their values, and last of the exponentials, float32."""
    B, T, N, H = q_BTNH.shape
    K, G = k_BTKH.shape[2], N // k_BTKH.shape[2]
    base_two = scale / math.log(2)
    own_RH = (q_BTNH.reshape(B, T, K, G, H) * k_BTKH[:, :, :, None]).reshape(-1, H)
    ones_H1 = jnp.ones((H, 1), own_RH.dtype)
    own_BTKG = base_two * product(own_RH, ones_H1, False, numerics).reshape(B, T, K, G)  # XLA's sum takes 20 times
    own_BKGT = own_BTKG.transpose(0, 2, 3, 1)
    q_BNTH, k_BKTH, v_BKTH = (heads_first(x, numerics, queries=T) for x in (q_BTNH, k_BTKH, v_BTKH))
    v_BKTV = jnp.concatenate([v_BKTH, jnp.ones((B, K, T, 1), v_BKTH.dtype)], axis=-1)

    def sums(queries: slice, keys: slice, *, causal: bool) -> Array:
        n, S = queries.stop - queries.start, keys.stop - keys.start
        s_BKMS = product(q_BNTH[:, :, queries].reshape(B, K, G * n, H), k_BKTH[:, :, keys], True, numerics)
        e_BKGnS = exp2_below(base_two * s_BKMS.reshape(B, K, G, n, S) - own_BKGT[..., queries, None], BELOW)
        allowed = mask._replace(
            causal=causal,
            query_segments_BT=None if mask.query_segments_BT is None else mask.query_segments_BT[:, queries],
            key_segments_BS=None if mask.key_segments_BS is None else mask.key_segments_BS[:, keys],
            query_offset=queries.start - keys.start,
        ).dense(n, S)
        if allowed is not None:
            e_BKGnS = jnp.where(allowed[:, None, None], e_BKGnS, 0)
        return product(e_BKGnS.reshape(B, K, G * n, S), v_BKTV[:, :, keys], False, numerics)

    blocks = []
    for begin in range(0, T, _block(T)):
        queries = slice(begin, min(begin + _block(T), T))
        first = 0 if mask.window is None else max(begin - mask.window + 1, 0)
        sums_BKMV = sums(queries, queries, causal=True)
        if first < begin:
            sums_BKMV += sums(queries, slice(first, begin), causal=False)
        blocks.append(sums_BKMV.reshape(B, N, -1, H + 1))
    return jnp.concatenate(blocks, axis=2)
