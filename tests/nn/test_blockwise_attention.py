"""Blockwise attention against the reference, and its memory."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.nn import blockwise_attention
from lm.nn.attention import AttentionMask, attend
from lm.nn.attention_backend import BACKENDS
from lm.nn.blockwise_attention import attend_blockwise, block_length
from lm.nn.matmul import numerics

from ..conftest import SHAPES, resolved
from .attention_cases import arrays, assert_equals_reference, compute, packed
from .test_language_model import assert_close, total_and_gradient, weights_of

pytestmark = pytest.mark.thorough


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16: a few dozen positions are several."""
    monkeypatch.setattr(blockwise_attention, "SMALLEST_BLOCK", 16)


@pytest.mark.parametrize(("T", "kv_heads"), [(1, 4), (3, 2), (65, 1), (127, 2), (65, 4)])
def test_equals_the_reference_packed_with_window_and_cap(T, kv_heads, small_blocks):
    assert_equals_reference(
        attend_blockwise, *arrays(T, 4, kv_heads), packed(2, T, causal=True, window=20), softcap=2.0
    )


@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 17), (False, None), (False, 16)])
def test_equals_the_reference_at_the_edges_of_blocks(causal, window, small_blocks):
    assert_equals_reference(attend_blockwise, *arrays(65, 2, 1), AttentionMask(causal, window=window))


@pytest.mark.parametrize("traced", [False, True])
def test_queries_that_begin_later_in_the_row(traced, small_blocks):
    q, k, v = arrays(5, 2, 2, S=70)
    mask = AttentionMask(True, query_offset=jnp.int32(40) if traced else 40, window=30)
    assert_equals_reference(attend_blockwise, q, k, v, mask)


def test_bfloat16_sums_in_float32(small_blocks):
    q, k, v = arrays(65, 4, 2)
    rounded = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    low = compute(attend_blockwise, *rounded, packed(2, 65, causal=True), dtype="bfloat16")
    assert low.dtype == jnp.bfloat16
    exact = compute(attend, *(x.astype(jnp.float32) for x in rounded), packed(2, 65, causal=True))
    np.testing.assert_allclose(low.astype(jnp.float32), exact, atol=6e-2)  # 8 bits of values up to 7


def test_blocks_that_share_no_segment_are_skipped(small_blocks):
    """What is not a number in a piece reaches no other, not even times a probability of 0."""
    q, k, v = arrays(64, 2, 2)
    pieces = jnp.repeat(jnp.array([[1, 2]]), 32, axis=1).repeat(2, axis=0)
    o = compute(attend_blockwise, q, k, v.at[:, :32].set(jnp.nan), AttentionMask(True, pieces, pieces))
    assert np.isnan(o[:, :32]).all() and np.isfinite(o[:, 32:]).all()


def test_a_block_of_padding_where_no_key_is_padding_is_finite(small_blocks):
    """Targets that all end early, of sources that all fill their row: nothing is there for the last block to see."""
    q, k, v = arrays(48, 2, 2)
    q = q[:, :40]
    targets, sources = jnp.repeat(jnp.array([[1, 0]]), 20, axis=1).repeat(2, axis=0), jnp.ones((2, 48), jnp.int32)
    mask = AttentionMask(False, query_segments_BT=targets, key_segments_BS=sources)

    how = {"scale": 0.5, "softcap": None, "numerics": numerics("float32"), "dropout": None}

    def loss(q, k, v):
        o = attend_blockwise(q, k, v, mask, **how)
        return jnp.sum(jnp.where(targets[:, :, None, None] > 0, o, 0) ** 2), o

    gradients, o = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    assert all(np.isfinite(each).all() for each in (*gradients, o))
    whole = attend(q, k, v, mask, **how)
    np.testing.assert_allclose(o[:, :20], whole[:, :20], atol=1e-5)


def test_blocks_that_causality_or_the_window_hide_are_not_listed():
    def pairs(mask):
        return set(blockwise_attention._pairs(mask, 64, 64, 16))

    assert pairs(AttentionMask(True)) == {(i, j) for i in range(4) for j in range(i + 1)}
    assert pairs(AttentionMask(True, window=17)) == {(i, j) for i in range(4) for j in (i - 1, i) if j >= 0}
    assert pairs(AttentionMask(True, window=18)) == {(i, j) for i in range(4) for j in range(max(i - 2, 0), i + 1)}


@pytest.mark.parametrize("positions", [1, 3, 8, 127, 128, 130, 511, 2048, 8192, 100_000])
def test_blocks_are_even(positions):
    c = block_length(positions)
    assert c % 8 == 0 and c <= 512
    assert -positions % c < 8 * -(-positions // c), "more padding than the eights ask for"


def temporary_bytes(back_end, T):
    """Of a compiled gradient, beside its arguments and results."""
    x = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, T), jnp.int32)

    def loss(q, k, v, ids):
        return compute(back_end, q, k, v, AttentionMask(True, ids, ids)).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x, ids).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_context_and_not_with_its_square():
    scores = 2 * 8192**2 * 4  # of two heads, once, in float32
    one, two = temporary_bytes(attend_blockwise, 8192), temporary_bytes(attend_blockwise, 16384)
    assert one < scores / 32
    assert two < 2.1 * one
    assert temporary_bytes(attend, 8192) > scores


def test_a_context_of_8192():
    """The last queries against the reference, which sees them alone."""
    T, last = 8192, 8
    q, k, v = arrays(T, 2, 1, B=1)
    ids = (jnp.arange(T) // 3000)[None]
    o = compute(attend_blockwise, q, k, v, AttentionMask(True, ids, ids))
    mask = AttentionMask(True, ids[:, -last:], ids, query_offset=T - last)
    np.testing.assert_allclose(o[:, -last:], compute(attend, q[:, -last:], k, v, mask), atol=1e-5)


def test_the_model_is_the_same(monkeypatch):
    """Packed rows, grouped heads, a window and caps, in blocks of 8: the loss, and all gradients."""
    monkeypatch.setattr(blockwise_attention, "SMALLEST_BLOCK", 8)
    cfg = resolved(dataclasses.replace(SHAPES["gemma"], num_layers=1, window=4, remat=True))
    tree = weights_of(cfg)
    wanted = total_and_gradient(dataclasses.replace(cfg, attention="reference"), tree)
    used = []
    monkeypatch.setitem(BACKENDS, "blockwise", lambda *a, **k: used.append(1) or attend_blockwise(*a, **k))
    got = total_and_gradient(dataclasses.replace(cfg, attention="blockwise"), tree)
    assert used
    assert_close(got, wanted, 1e-5)  # float32, other order of summation


def test_dropout_is_never_dropped_silently():
    q, k, v = arrays(3, 2, 2)
    with pytest.raises(AssertionError, match="dropout"):
        attend_blockwise(
            q, k, v, AttentionMask(True), scale=1.0, softcap=None, numerics=numerics("float32"), dropout=(0.1, None)
        )
