"""Attention by the splash kernel on TPUs (Pallas; sparse flash attention).

It stands under `jax.experimental`: JAX has no stable name for an attention kernel on TPUs that knows segments, windows
and soft-caps.

Shapes: B batch, T query position, S key position, N query heads, K key/value heads, H head width.
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
    k_BSKH: Array,
    v_BSKH: Array,
    mask: AttentionMask,
    *,
    scale: float,
    softcap: float | None,
    numerics: Numerics,
    dropout: Dropout | None,
    bias_NTS: Array | None = None,
    interpret: bool = False,
) -> Array:
    """`lm.nn.attention.attend` in a Pallas kernel: no scores in memory, blocks that nothing sees are skipped.

    Rows of any length are padded to whole blocks, with a segment that nothing else sees. Queries are scaled before the
    product, in their own dtype. The products are those of a TPU's default precision: `numerics` asks for no more than
    bfloat16, but in `interpret`, which runs the kernel on any platform for tests.
    """
    assert dropout is None and bias_NTS is None, "splash attention has no dropout on probabilities and no bias"
    assert isinstance(mask.query_offset, int) and mask.query_offset == 0, "splash attention is of whole rows"
    assert interpret or numerics.dtype == "bfloat16", numerics
    B, T, N, _ = q_BTNH.shape
    kernel = _kernel((_whole(T), _whole(k_BSKH.shape[1])), N, mask.causal, mask.window, softcap, interpret)
    q_BTNH = (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)
    q_BNTH, k_BKSH, v_BKSH = (
        jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, _whole(x.shape[1]) - x.shape[1]), (0, 0)))
        for x in (q_BTNH, k_BSKH, v_BSKH)
    )
    o_BNTH = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, _segments(mask, B, T, k_BSKH.shape[1]))
    return o_BNTH[:, :, :T].swapaxes(1, 2).astype(q_BTNH.dtype)


def _whole(length: int) -> int:
    return -(-length // LANES) * LANES


def _kernel(
    shape: tuple[int, int], heads: int, causal: bool, window: int | None, softcap: float | None, interpret: bool
) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to import, and of use on TPUs alone

    seen: Any = splash.CausalMask(shape) if causal else splash.FullMask(shape)
    if window is not None:
        seen = splash.LocalMask(shape, (window - 1, 0 if causal else window - 1), offset=0)
    q, kv = (next(size for size in (LARGEST_BLOCK, LARGEST_BLOCK // 2, LANES) if of % size == 0) for of in shape)
    return splash.make_splash_mha(
        splash.MultiHeadMask([seen] * heads),
        block_sizes=splash.BlockSizes(
            block_q=q,
            block_kv=kv,
            block_q_dkv=q,
            block_kv_dkv=kv,
            block_q_dq=q,
            block_kv_dq=kv,
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )


def _segments(mask: AttentionMask, B: int, T: int, S: int) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    if mask.query_segments_BT is None and T % LANES == S % LANES == 0:
        return None
    q, kv = (
        jnp.pad(
            jnp.zeros((B, length), jnp.int32) if x is None else x,
            ((0, 0), (0, _whole(length) - length)),
            constant_values=-1,
        )
        for x, length in ((mask.query_segments_BT, T), (mask.key_segments_BS, S))
    )
    return splash.SegmentIds(q, kv)
