"""Attention by the splash kernel on TPUs (Pallas; sparse flash attention).

It stands under `jax.experimental`: JAX has no stable name for an attention kernel on TPUs that knows segments, windows
and soft-caps.

Shapes: B batch, T position (of queries and keys), N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lm.nn.attention import AttentionMask
from lm.nn.layers import Dropout
from lm.nn.matmul import Numerics

Array = jax.Array
LANES = 128  # rows come in multiples of the TPU's vector width
LARGEST_BLOCK = 512


def attend_splash(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    mask: AttentionMask,
    *,
    scale: float,
    softcap: float | None,
    numerics: Numerics,
    dropout: Dropout | None,
    interpret: bool = False,
) -> Array:
    """`lm.nn.attention.attend` in a Pallas kernel: no scores in memory, blocks that nothing sees are skipped.

    Rows of any length are padded to whole blocks, with a segment that nothing else sees. Queries are scaled before the
    product, in their own dtype. The products are those of a TPU's default precision: `numerics` asks for no more than
    bfloat16, but in `interpret`, which runs the kernel on any platform for tests.
    """
    assert dropout is None, "splash attention has no dropout on probabilities"
    assert isinstance(mask.query_offset, int) and mask.query_offset == 0, "splash attention is of whole rows"
    assert q_BTNH.shape[1] == k_BTKH.shape[1], "splash attention is of a row with itself"
    assert interpret or numerics.dtype == "bfloat16", numerics
    B, T, N, _ = q_BTNH.shape
    length = -(-T // LANES) * LANES
    kernel = _kernel(length, N, mask.causal, mask.window, softcap, interpret)
    q_BTNH = (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)
    q_BNTH, k_BKTH, v_BKTH = (
        jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, length - T), (0, 0))) for x in (q_BTNH, k_BTKH, v_BTKH)
    )
    o_BNTH = jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, _segments(mask, B, T, length))
    return o_BNTH[:, :, :T].swapaxes(1, 2).astype(q_BTNH.dtype)


def _kernel(length: int, heads: int, causal: bool, window: int | None, softcap: float | None, interpret: bool) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to import, and of use on TPUs alone

    shape = (length, length)
    seen: Any = splash.CausalMask(shape) if causal else splash.FullMask(shape)
    if window is not None:
        seen = splash.LocalMask(shape, (window - 1, 0 if causal else window - 1), offset=0)
    block = next(size for size in (LARGEST_BLOCK, LARGEST_BLOCK // 2, LANES) if length % size == 0)
    return splash.make_splash_mha(
        splash.MultiHeadMask([seen] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )


def _segments(mask: AttentionMask, B: int, T: int, length: int) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    if mask.query_segments_BT is None and length == T:
        return None
    whole = jnp.zeros((B, T), jnp.int32)
    pairs = (mask.query_segments_BT, mask.key_segments_BS)
    q, kv = (jnp.pad(whole if x is None else x, ((0, 0), (0, length - T)), constant_values=-1) for x in pairs)
    return splash.SegmentIds(q, kv)
