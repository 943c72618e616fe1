"""Attention by cuDNN's fused kernel on NVIDIA GPUs, through `jax.nn.dot_product_attention`.

The kernel knows causality, windows to the left, grouped heads and the scale; segments only as a dense mask, soft-caps
and dropout not at all (`lm.nn.attention_backend.refusal` says what it demands of a config).

Shapes: B batch, T query position, S key position, N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lm.nn.attention import AttentionMask
from lm.nn.layers import Dropout
from lm.nn.matmul import Numerics

Array = jax.Array


def attend_cudnn(
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
    """`lm.nn.attention.attend` in cuDNN: bfloat16 operands, float32 softmax, no scores in memory.

    Segments make a mask [B, 1, T, S], 2 bytes an entry, which all heads share.
    """
    assert softcap is None and dropout is None and numerics.dtype == "bfloat16", (softcap, dropout, numerics)
    assert bias_NTS is None, "a bias on scores is left to the reference"
    assert isinstance(mask.query_offset, int) and mask.query_offset == 0, "cuDNN counts queries from the first key"
    window, dense_BTS = mask.window, None
    if mask.query_segments_BT is not None:
        # cuDNN refuses a window beside a mask: so the mask holds both. Causality it keeps, and skips blocks by it.
        dense_BTS = mask._replace(causal=False).dense(q_BTNH.shape[1], k_BSKH.shape[1])
        window = None
    assert mask.causal or window is None, "cuDNN has no window to the right"
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH.astype(q_BTNH.dtype),
        v_BSKH.astype(q_BTNH.dtype),
        mask=None if dense_BTS is None else jnp.expand_dims(dense_BTS, 1),
        scale=scale,
        is_causal=mask.causal,
        local_window_size=None if window is None else (window - 1, 0),  # those before a query, itself not counted
        implementation="cudnn",
    )
