"""Causal attention in blocks of queries against the reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from lm.nn import prefix_attention
from lm.nn.attention import AttentionMask, attend
from lm.nn.matmul import numerics
from lm.nn.prefix_attention import attend_prefix

from .attention_cases import SCALE, arrays, assert_equals_reference, packed


@pytest.fixture(autouse=True, params=[0, 2**20], ids=["again", "kept"])
def small_blocks(monkeypatch, request):
    monkeypatch.setattr(prefix_attention, "BLOCK", 16)
    monkeypatch.setattr(prefix_attention, "KEPT", request.param)


@pytest.mark.parametrize(("T", "kv_heads"), [(1, 4), (65, 2)])
def test_equals_the_reference_packed_with_window_and_cap(T, kv_heads):
    assert_equals_reference(attend_prefix, *arrays(T, 4, kv_heads), packed(2, T, causal=True, window=20), softcap=2.0)


def test_queries_that_begin_later_in_the_row():
    q, k, v = arrays(37, 2, 2, S=70)
    assert_equals_reference(attend_prefix, q, k, v, AttentionMask(True, query_offset=33))


def test_scores_that_causality_masks_are_not_made():
    q, k, v = arrays(64, 2, 2)

    def products(back_end):
        how = {"scale": SCALE, "softcap": None, "numerics": numerics("float32"), "dropout": None}
        run = jax.jit(lambda q, k, v: back_end(q, k, v, AttentionMask(True), **how))
        return run.lower(q, k, v).compile().cost_analysis()["flops"]

    assert products(attend_prefix) < 0.7 * products(attend)  # 10 of 16 blocks


@pytest.mark.parametrize("window", [None, 20])
def test_no_gradient_of_a_block_is_padded_to_the_whole(window):
    how = {"scale": SCALE, "softcap": None, "numerics": numerics("float32"), "dropout": None}

    def loss(q, k, v):
        return jnp.sum(attend_prefix(q, k, v, AttentionMask(True, window=window), **how))

    assert " pad[" not in str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*arrays(64, 2, 2)))


def test_without_causality_it_is_the_reference():
    q, k, v = arrays(40, 2, 2)
    how = {"scale": SCALE, "softcap": None, "numerics": numerics("float32"), "dropout": None}
    mask = AttentionMask(False)
    assert jnp.array_equal(attend_prefix(q, k, v, mask, **how), attend(q, k, v, mask, **how))


def test_of_long_rows_the_backward_pass_keeps_no_probabilities(monkeypatch):
    """Of eight layers one after another: 8 x 10 / 16 T² numbers for each head."""
    how = {"scale": SCALE, "softcap": None, "numerics": numerics("float32"), "dropout": None}
    T, layers = 256, 8
    shape = jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32)

    def loss(x):
        for _ in range(layers):
            x = x + attend_prefix(x, x, x, AttentionMask(True), **how)
        return jnp.sum(x)

    def temporary(kept):
        monkeypatch.setattr(prefix_attention, "KEPT", kept)
        return jax.jit(jax.grad(loss)).lower(shape).compile().memory_analysis().temp_size_in_bytes

    assert temporary(T) - temporary(T - 1) > (layers - 1) * 2 * T * T / 2 * 4
