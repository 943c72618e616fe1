"""Attention: the core `attend`, and the self-attention block around it.

Shapes: B batch, T query position, S key position, D model width, N query heads, K key/value heads, G = N / K queries a
key/value head, H head width, E = (G + 2) H.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.nn import params as declare
from lm.nn.cache import KeyValueCache
from lm.nn.layers import Constrain, Dropout, drop, norm_specs, rms_norm, rotary
from lm.nn.matmul import Numerics, product, project
from lm.nn.params import ParamSpec

Array = jax.Array


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
) -> Array:
    """Scaled dot-product attention, softmax(scale · q kᵀ + mask) v (Vaswani et al. 2017, eq. 1), with grouped heads.

    N must be a multiple of K; query head n reads key/value head n // (N / K) (Ainslie et al. 2023, arXiv:2305.13245).
    `softcap` bounds the scores, before the mask, by softcap · tanh(scores / softcap) (Gemma 2, arXiv:2408.00118).
    `dropout` falls on the probabilities. Returns o_BTNH in q's dtype.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G = N // K
    # Two batch axes and two matrix axes: the form that every back end has a fast product for.
    q_BKtH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    scores_BKGTS = scale * product(q_BKtH, k_BKSH, True, numerics).reshape(B, K, G, T, S)
    if softcap is not None:
        scores_BKGTS = softcap * jnp.tanh(scores_BKGTS / softcap)
    allowed = mask.dense(T, S)
    if allowed is not None:
        # Finite: a row of padding may see nothing, and a softmax over -inf alone is NaN.
        scores_BKGTS = jnp.where(allowed[:, None, None], scores_BKGTS, -1e30)
    # float32: the sum of thousands of bfloat16 exponentials loses two digits
    probabilities = drop(jax.nn.softmax(scores_BKGTS, axis=-1), dropout)
    o_BKtH = product(probabilities.reshape(B, K, G * T, S), v_BKSH, False, numerics)
    return o_BKtH.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q_BTNH.dtype)


def self_attention_specs(
    width: int,
    *,
    heads: int,
    kv_heads: int,
    head_width: int,
    qkv_bias: bool,
    out_bias: bool,
    qk_norm: bool,
    norm_offset: bool,
    init_qkv: Callable,
    init_out: Callable,
) -> dict[str, Any]:
    """`init_*` take the numbers of inputs and outputs of the matrix and give its initializer.

    Query, key and value are one matrix, a group of heads after another, so that splitting the key/value heads over
    devices keeps each group together.
    """
    group = (heads // kv_heads + 2) * head_width
    specs: dict[str, Any] = {
        "qkv": ParamSpec(
            (width, kv_heads, group), ("embed", "kv_heads", "qkv"), init_qkv(width, kv_heads * group), inputs=1
        ),
        "out": ParamSpec(
            (heads, head_width, width), ("heads", "head", "embed"), init_out(heads * head_width, width), inputs=2
        ),
    }
    if qkv_bias:
        specs["qkv_bias"] = ParamSpec((kv_heads, group), ("kv_heads", "qkv"), declare.zeros)
    if out_bias:
        specs["out_bias"] = ParamSpec((width,), ("norm",), declare.zeros)
    if qk_norm:
        for name in ("q_norm", "k_norm"):
            specs[name] = norm_specs(head_width, kind="rmsnorm", bias=False, offset=norm_offset)
    return specs


def self_attention(
    params: dict[str, Any],
    x_BTD: Array,
    positions_BT: Array,
    mask: AttentionMask,
    *,
    head_width: int,
    rotary_frequency_h: Array | None,
    scale: float,
    softcap: float | None,
    norm_epsilon: float,
    norm_offset: bool,
    numerics: Numerics,
    dropout: Dropout | None,
    constrain: Constrain,
    cache: KeyValueCache | None,
    layer: Array | int,
) -> tuple[Array, KeyValueCache | None]:
    """Projects x to queries, keys and values, attends, projects back to [B, T, D].

    `rotary_frequency_h` [H / 2] is how far rotary positions turn, in radians a token; None: they don't. `scale` and
    `softcap` are those of `attend`. With a cache, keys and values are appended to it (at `layer`) and the queries
    attend to all that it holds. The norms on queries and keys (Henry et al. 2020, arXiv:2010.04245) come before the
    rotation.
    """
    B, T, _ = x_BTD.shape
    qkv_BTKE = project(x_BTD, params["qkv"], params.get("qkv_bias"), inputs=1, numerics=numerics)
    qkv_BTKE = constrain(qkv_BTKE, ("batch", "length", "kv_heads", "qkv"))
    K, E = qkv_BTKE.shape[2:]
    G = E // head_width - 2
    q_BTNH = qkv_BTKE[..., : G * head_width].reshape(B, T, K * G, head_width)
    k_BTKH = qkv_BTKE[..., G * head_width : (G + 1) * head_width]
    v_BTKH = qkv_BTKE[..., (G + 1) * head_width :]
    if "q_norm" in params:
        q_BTNH = rms_norm(q_BTNH, params["q_norm"]["scale"], epsilon=norm_epsilon, offset=norm_offset)
        k_BTKH = rms_norm(k_BTKH, params["k_norm"]["scale"], epsilon=norm_epsilon, offset=norm_offset)
    if rotary_frequency_h is not None:
        q_BTNH = rotary(q_BTNH, positions_BT, rotary_frequency_h)
        k_BTKH = rotary(k_BTKH, positions_BT, rotary_frequency_h)
    k_BSKH, v_BSKH = k_BTKH, v_BTKH
    if cache is not None:
        cache = cache.write(layer, k_BTKH, v_BTKH)
        k_BSKH, v_BSKH = cache.read(layer, q_BTNH.dtype)
    o_BTNH = attend(q_BTNH, k_BSKH, v_BSKH, mask, scale=scale, softcap=softcap, numerics=numerics, dropout=dropout)
    o_BTNH = constrain(o_BTNH, ("batch", "length", "heads", "head"))
    return project(o_BTNH, params["out"], params.get("out_bias"), inputs=2, numerics=numerics), cache
