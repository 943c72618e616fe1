"""Attention: who sees whom, and the core `attend`, the reference of every back end.

Shapes: B batch, T query position, S key position, N query heads, K key/value heads, G = N / K queries a key/value head,
H head width, M = G T rows of one key/value head's products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.nn.late import late, written
from lm.nn.layers import Dropout, drop
from lm.nn.matmul import Numerics, heads_first, product, sum_of_rows

Array = jax.Array


Attend = Callable[..., Array]
"""A back end: computes what `attend` does, of the same arguments."""


class AttentionMask(NamedTuple):
    """Who may attend to whom, as structure. All conditions hold at once.

    causal: a query sees keys at or before its own index in the row. Counting by index equals counting by position,
      because a piece is contiguous in its row.
    query_segments_BT, key_segments_BS: a query sees keys of its own segment alone. None: all of the row.
    query_offset: index in the keys' row of the first query, for a cache.
    window: a query sees keys fewer than this many places away by index: if causal, itself and the window - 1 before it.
    """

    causal: bool
    query_segments_BT: Array | None = None
    key_segments_BS: Array | None = None
    query_offset: Array | int = 0
    window: int | None = None

    def dense(self, queries: int, keys: int) -> Array | None:
        """The mask as a boolean [1 or B, T, S], or None if nothing is masked."""
        allowed = None
        query_T1 = self.query_offset + jnp.arange(queries)[:, None]
        key_1S = jnp.arange(keys)[None, :]
        if self.causal:
            allowed = (key_1S <= query_T1)[None]
        if self.window is not None:
            near = (jnp.abs(query_T1 - key_1S) < self.window)[None]
            allowed = near if allowed is None else allowed & near
        if self.query_segments_BT is not None:
            assert self.key_segments_BS is not None
            same_BTS = self.query_segments_BT[:, :, None] == self.key_segments_BS[:, None, :]
            allowed = same_BTS if allowed is None else allowed & same_BTS
        return allowed


def attend(
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
    """Scaled dot-product attention, softmax(scale · q kᵀ + mask) v (Vaswani et al. 2017, eq. 1), with grouped heads.

    N must be a multiple of K; query head n reads key/value head n // (N / K) (Ainslie et al. 2023, arXiv:2305.13245).
    `bias_NTS`, float32, is added to the scaled scores of every row of the batch (Raffel et al. 2020, arXiv:1910.10683,
    section 2.1). `softcap` bounds the scores, before the mask, by softcap · tanh(scores / softcap) (Gemma 2,
    arXiv:2408.00118). `dropout` falls on the probabilities. Returns o_BTNH in q's dtype.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G = N // K
    # Two batch axes and two matrix axes: the form that every back end has a fast product for.
    q_BNTH, k_BKSH, v_BKSH = (heads_first(x, numerics, queries=T) for x in (q_BTNH, k_BSKH, v_BSKH))
    q_BKMH = q_BNTH.reshape(B, K, G * T, H)
    allowed = mask.dense(T, S)
    bias_KMS = None if bias_NTS is None else bias_NTS.reshape(K, G * T, S)
    if softcap is None and dropout is None:
        o_BKMH = _attend(q_BKMH, k_BKSH, v_BKSH, bias_KMS, allowed, scale, numerics)
    else:
        scores_BKMS = _scores(q_BKMH, k_BKSH, bias_KMS, scale, numerics)
        if softcap is not None:
            scores_BKMS = softcap * jnp.tanh(scores_BKMS / softcap)
        probabilities = _softmax(scores_BKMS, allowed).reshape(B, K, G, T, S)
        probabilities = drop(probabilities, dropout).reshape(B, K, G * T, S)
        o_BKMH = product(probabilities, v_BKSH, False, numerics).astype(q_BTNH.dtype)
    return heads_first(o_BKMH.reshape(B, N, T, H), numerics, queries=T)


def _scores(q_BKMH: Array, k_BKSH: Array, bias_KMS: Array | None, scale: float, numerics: Numerics) -> Array:
    """scale · q kᵀ + bias, [B, K, M, S], float32."""
    scores_BKMS = scale * product(q_BKMH, k_BKSH, True, numerics)
    return scores_BKMS if bias_KMS is None else scores_BKMS + bias_KMS[None]


def _softmax(scores_BKMS: Array, allowed: Array | None) -> Array:
    """Over what is allowed, [1 or B, T, S], float32: the sum of thousands of bfloat16 exponentials loses two digits."""
    return jax.nn.softmax(_masked(scores_BKMS, allowed), axis=-1)


def _masked(scores_BKMS: Array, allowed: Array | None) -> Array:
    """The scores of what is allowed, else -1e30. Finite: a row of padding may see nothing, and a softmax over -inf
    alone is NaN."""
    if allowed is None:
        return scores_BKMS
    B, K, M, S = scores_BKMS.shape
    T = allowed.shape[1]
    return jnp.where(allowed[:, None, None], scores_BKMS.reshape(B, K, M // T, T, S), -1e30).reshape(B, K, M, S)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(
    q_BKMH: Array,
    k_BKSH: Array,
    v_BKSH: Array,
    bias_KMS: Array | None,
    allowed: Array | None,
    scale: float,
    numerics: Numerics,
) -> Array:
    """o_BKMH in q's dtype.

    Without a gradient to take, the sums divide what comes out, [M, H], not the probabilities, [M, S] (Dao 2023,
    arXiv:2307.08691, section 3.1): a CPU's attention takes a fifth less time. With one, the probabilities are needed.
    """
    scores_BKMS = _masked(_scores(q_BKMH, k_BKSH, bias_KMS, scale, numerics), allowed)
    e_BKMS = jnp.exp(scores_BKMS - jnp.max(scores_BKMS, axis=-1, keepdims=True))
    sums_BKM1 = jnp.sum(e_BKMS, axis=-1, keepdims=True)
    return (product(e_BKMS, v_BKSH, False, numerics) / sums_BKM1).astype(q_BKMH.dtype)


def _forward(
    q: Array, k: Array, v: Array, bias: Array | None, allowed: Array | None, scale: float, numerics: Numerics
) -> tuple[Array, tuple[Array | None, ...]]:
    """The probabilities are kept for the backward pass in the compute dtype."""
    p = _softmax(_scores(q, k, bias, scale, numerics), allowed).astype(numerics.dtype)
    o = product(p, v, False, numerics).astype(q.dtype)
    return o, (q, k, v, bias, p, o)


def _backward(
    scale: float, numerics: Numerics, saved: tuple[Array, ...], do: Array
) -> tuple[Array, Array, Array, Array | None, None]:
    """Of scores s: ds = p (dp - Σ p dp), where dp = do · vᵀ and Σ p dp = do · o (Dao et al. 2022, arXiv:2205.14135).
    The bias's is their sum over the batch."""
    q, k, v, bias, p, o = saved
    p, o = late(p, do[..., :1]), late(o, do)
    # XLA's CPU library would take in what comes before and after this sum, and compute it an operation at a time: what
    # comes before from JAX 0.12 on.
    meet = written(jnp.sum(written(do.astype(jnp.float32) * o.astype(jnp.float32)), axis=-1, keepdims=True))
    dp = product(do, v, True, numerics)
    dbias = None if bias is None else jnp.sum(p * (dp - meet), axis=0).astype(bias.dtype)
    ds = scale * p * (dp - meet)
    ds = ds.astype(numerics.dtype)  # an operand of two products: cast once
    dq = product(ds, k, False, numerics)
    dk, dv = sum_of_rows(ds, q, numerics), sum_of_rows(p, do, numerics)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dbias, None


_attend.defvjp(_forward, _backward)
