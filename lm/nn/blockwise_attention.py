"""Attention whose memory grows with the length of a row, not with its square: scores exist a block at a time.

The forward pass keeps a running maximum and sum of exponentials for every query (Milakov & Gimelshein 2018,
arXiv:1805.02867); the backward pass computes each block's probabilities again from log Σ exp(scores) (FlashAttention-2,
Dao 2023, arXiv:2307.08691, algorithms 1 and 2). Both are one scan over the pairs of blocks that may see each other,
listed when the program is traced; pairs that have no segment in common are skipped when it runs.

Shapes: B batch, T query position, S key position, N query heads, K key/value heads, G = N / K queries a key/value head,
H head width, c positions in a block, n and m query and key blocks, P pairs of blocks, g = G c.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lm.nn.attention import AttentionMask
from lm.nn.layers import Dropout
from lm.nn.matmul import Numerics, product

Array = jax.Array
SMALLEST_BLOCK, LARGEST_BLOCK = 128, 512
MASKED = -1e30  # finite: a query that sees nothing has no maximum otherwise


def attend_blockwise(
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
    """`lm.nn.attention.attend` in memory linear in T and S, to its numbers but for the order of summation.

    It has no dropout: the reference draws its mask for [T, S] whole. What a query sees that may see nothing is finite
    and otherwise undefined.
    """
    assert dropout is None and bias_NTS is None, "blockwise attention has no dropout on probabilities and no bias"
    T, (S, K) = q_BTNH.shape[1], k_BSKH.shape[1:3]
    c = block_length(max(T, S))
    form = _Form(scale, softcap, numerics, mask.causal, mask.window, c, S, _pairs(mask, T, S, c))
    places = _Places(
        jnp.asarray(mask.query_offset, jnp.int32),
        None if mask.query_segments_BT is None else _cut(mask.query_segments_BT, c),
        None if mask.key_segments_BS is None else _cut(mask.key_segments_BS, c),
    )
    o_nBKgH = _attend(form, _fold(q_BTNH, K, c), _fold(k_BSKH, K, c), _fold(v_BSKH, K, c), places)
    return _unfold(o_nBKgH, q_BTNH.shape, c).astype(q_BTNH.dtype)


def block_length(positions: int) -> int:
    """Positions in a block: about a sixteenth of the row, from 128 to 512; as even as multiples of 8 can be."""
    most = min(max(positions // 16, SMALLEST_BLOCK), LARGEST_BLOCK)
    return -(-positions // (-(-positions // most) * 8)) * 8


class _Form(NamedTuple):
    """All that is known when the program is traced."""

    scale: float
    softcap: float | None
    numerics: Numerics
    causal: bool
    window: int | None
    c: int
    keys: int  # S, without the padding of the last block
    pairs: tuple[tuple[int, int], ...]  # of query and key blocks


class _Places(NamedTuple):
    """Where queries and keys stand: index in the keys' row of the first query, and segments by blocks."""

    offset: Array
    query_segments_nBc: Array | None
    key_segments_mBc: Array | None

    def seen(self, form: _Form) -> Array:
        """[P]: whether the segments of two blocks overlap in any row. Their ranges decide: too many, never too few."""
        if self.query_segments_nBc is None or self.key_segments_mBc is None:
            return jnp.ones((len(form.pairs),), bool)
        q, k = self.query_segments_nBc, self.key_segments_mBc
        low = q.min(-1)[:, None] <= k.max(-1)[None]
        high = q.max(-1)[:, None] >= k.min(-1)[None]
        i, j = jnp.array(form.pairs).T
        return jnp.any(low & high, axis=-1)[i, j]

    def allowed(self, form: _Form, i: Array, j: Array) -> Array:
        """The mask of one pair of blocks, [1 or B, c, c]."""
        query_c1 = (self.offset + i * form.c + jnp.arange(form.c))[:, None]
        key_1c = (j * form.c + jnp.arange(form.c))[None, :]
        allowed = (key_1c < form.keys) & jnp.ones_like(query_c1, bool)
        if form.causal:
            allowed &= key_1c <= query_c1
        if form.window is not None:
            allowed &= jnp.abs(query_c1 - key_1c) < form.window
        if self.query_segments_nBc is None or self.key_segments_mBc is None:
            return allowed[None]
        return allowed[None] & (self.query_segments_nBc[i][:, :, None] == self.key_segments_mBc[j][:, None, :])


def _pairs(mask: AttentionMask, T: int, S: int, c: int) -> tuple[tuple[int, int], ...]:
    """The pairs of blocks in which causality and window leave something to see; all where the offset is traced."""
    offset = mask.query_offset

    def may_see(i: int, j: int) -> bool:
        if not isinstance(offset, int):
            return True
        first, last = offset + i * c, offset + min((i + 1) * c, T) - 1
        begin, end = j * c, min((j + 1) * c, S) - 1
        if mask.causal and begin > last:
            return False
        return mask.window is None or (end > first - mask.window and begin < last + mask.window)

    return tuple((i, j) for i in range(-(-T // c)) for j in range(-(-S // c)) if may_see(i, j))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(form: _Form, q_nBKgH: Array, k_mBKcH: Array, v_mBKcH: Array, places: _Places) -> Array:
    return _forward(form, q_nBKgH, k_mBKcH, v_mBKcH, places)[0]


def _forward(form: _Form, q: Array, k: Array, v: Array, places: _Places) -> tuple[Array, tuple]:
    """o_nBKgH, float32, and what the backward pass needs: the arguments, o and log Σ exp(scores), [n, B, K, g]."""

    # As if they followed from q: masks would follow from segments alone, and a layer that is computed again in the
    # backward pass would keep those of all pairs of blocks.
    places = lax.optimization_barrier((q, places))[1]

    def step(carry: Any, i: Array, j: Array) -> Any:
        o_BKgH, best_BKg, sum_BKg = carry
        scores_BKgc = _scores(form, q[i], k[j], places, i, j)
        new_BKg = jnp.maximum(best_BKg, scores_BKgc.max(-1))
        p_BKgc = jnp.exp(scores_BKgc - new_BKg[..., None])
        shrink_BKg = jnp.exp(best_BKg - new_BKg)
        o_BKgH = o_BKgH * shrink_BKg[..., None] + product(p_BKgc, v[j], False, form.numerics)
        return o_BKgH, new_BKg, sum_BKg * shrink_BKg + p_BKgc.sum(-1)

    def one(carry: Any, pair: tuple[Array, Array, Array]) -> tuple[Any, None]:
        i, j, seen = pair
        mine = jax.tree.map(lambda x: x[i], carry)
        mine = _if_seen(places, seen, lambda: step(mine, i, j), lambda: mine)
        return jax.tree.map(lambda x, block: x.at[i].set(block), carry, mine), None

    o, best, total = (
        jnp.full(shape, value, jnp.float32)
        for shape, value in zip((q.shape, q.shape[:-1], q.shape[:-1]), (0.0, MASKED, 0.0), strict=True)
    )
    (o, best, total), _ = lax.scan(one, (o, best, total), _scanned(form, places))
    total = jnp.where(total > 0, total, 1.0)  # 0 where a block saw no other: of padding, where there are no padded keys
    o = (o / total[..., None]).astype(q.dtype)
    return o, (q, k, v, places, o, best + jnp.log(total))


def _backward(form: _Form, saved: tuple, do: Array) -> tuple[Array, Array, Array, None]:
    """Of scores s, with p = exp(s - log Σ exp s): ds = p (dp - Σ p dp), where dp = do · v and Σ p dp = do · o."""
    q, k, v, places, o, total = saved
    meet = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1)

    def step(i: Array, j: Array) -> tuple[Array, Array, Array]:
        q_i, k_j, v_j = (x.astype(jnp.float32) for x in (q[i], k[j], v[j]))  # float32: so are the sums over blocks
        scores, back = jax.vjp(lambda q, k: _scores(form, q, k, places, i, j), q_i, k_j)
        p = jnp.exp(scores - total[i][..., None])
        dp, dv = jax.vjp(lambda p, v: product(p, v, False, form.numerics), p, v_j)[1](do[i].astype(jnp.float32))
        return *back(p * (dp - meet[i][..., None])), dv

    def one(sums: tuple[Array, ...], pair: tuple[Array, Array, Array]) -> tuple[tuple[Array, ...], None]:
        i, j, seen = pair
        shapes = jax.eval_shape(step, i, j)
        nothing = lambda: tuple(jnp.zeros(x.shape, x.dtype) for x in shapes)  # noqa: E731
        found = _if_seen(places, seen, lambda: step(i, j), nothing)
        return tuple(total.at[at].add(x) for total, at, x in zip(sums, (i, j, j), found, strict=True)), None

    sums = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    sums, _ = lax.scan(one, sums, _scanned(form, places))
    dq, dk, dv = (total.astype(x.dtype) for total, x in zip(sums, (q, k, v), strict=True))
    return dq, dk, dv, None


_attend.defvjp(_forward, _backward)


def _scores(form: _Form, q_BKgH: Array, k_BKcH: Array, places: _Places, i: Array, j: Array) -> Array:
    """The scores of a pair of blocks, capped and masked, [B, K, g, c], float32."""
    B, K, g, _ = q_BKgH.shape
    scores = form.scale * product(q_BKgH, k_BKcH, True, form.numerics).reshape(B, K, g // form.c, form.c, form.c)
    if form.softcap is not None:
        scores = form.softcap * jnp.tanh(scores / form.softcap)
    return jnp.where(places.allowed(form, i, j)[:, None, None], scores, MASKED).reshape(B, K, g, form.c)


def _scanned(form: _Form, places: _Places) -> tuple[Array, Array, Array]:
    i, j = jnp.array(form.pairs, jnp.int32).T
    return i, j, places.seen(form)


def _if_seen(places: _Places, seen: Array, then: Callable, otherwise: Callable) -> Any:
    return then() if places.query_segments_nBc is None else lax.cond(seen, then, otherwise)


def _cut(x_BT: Array, c: int) -> Array:
    """[B, T, ...] to blocks [n, B, c, ...], padded at the end."""
    B, T = x_BT.shape[:2]
    x = jnp.pad(x_BT, ((0, 0), (0, -T % c)) + ((0, 0),) * (x_BT.ndim - 2))
    return x.reshape(B, -1, c, *x_BT.shape[2:]).swapaxes(0, 1)


def _fold(x_BTNH: Array, kv_heads: int, c: int) -> Array:
    """[B, T, N, H] to blocks of rows of the products, [n, B, K, g, H]."""
    x_nBcNH = _cut(x_BTNH, c)
    n, B, _, N, H = x_nBcNH.shape
    return x_nBcNH.reshape(n, B, c, kv_heads, -1, H).transpose(0, 1, 3, 4, 2, 5).reshape(n, B, kv_heads, -1, H)


def _unfold(x_nBKgH: Array, shape: tuple[int, ...], c: int) -> Array:
    """The inverse of `_fold`, to [B, T, N, H] of this shape."""
    B, T, N, H = shape
    n, _, K = x_nBKgH.shape[:3]
    return x_nBKgH.reshape(n, B, K, N // K, c, H).transpose(1, 0, 4, 2, 3, 5).reshape(B, n * c, N, H)[:, :T]
