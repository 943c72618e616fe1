"""Causal attention shifted by a query's score of its own key, against the reference."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.nn import shifted_attention
from lm.nn.attention import AttentionMask, attend
from lm.nn.matmul import numerics
from lm.nn.shifted_attention import MOST, attend_shifted

from .attention_cases import SCALE, arrays, assert_equals_reference, compute, packed


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(shifted_attention, "_block", lambda tokens: 16)


@pytest.fixture
def prefix_forbidden(monkeypatch):
    """Of a cond both branches are traced: the other one gives zeros here."""
    monkeypatch.setattr(shifted_attention, "attend_prefix", lambda q, *_, **__: jnp.zeros_like(q))


def assert_same_values(q, k, v, mask, *, softcap=None, dtype="float32", tolerance=3e-6):
    """3e-6 of the largest: float32 in another order of summation, and an exponential of 3e-7."""
    got = compute(attend_shifted, q, k, v, mask, softcap=softcap, dtype=dtype)
    wanted = compute(attend, q, k, v, mask, softcap=softcap)
    np.testing.assert_allclose(got, wanted, atol=tolerance * float(jnp.abs(wanted).max()), rtol=0)


@pytest.mark.usefixtures("prefix_forbidden")
@pytest.mark.parametrize(("T", "kv_heads", "window"), [(1, 4, None), (3, 2, None), (65, 2, None), (127, 1, 20)])
def test_equals_the_reference_packed(T, kv_heads, window):
    assert_same_values(*arrays(T, 4, kv_heads), packed(2, T, causal=True, window=window))


@pytest.mark.usefixtures("prefix_forbidden")
def test_equals_the_reference_without_segments_and_in_bfloat16():
    q, k, v = arrays(70, 4, 2, H=32)
    assert_same_values(q, k, v, AttentionMask(True))
    assert_same_values(q, k, v, AttentionMask(True), dtype="bfloat16", tolerance=0.02)


def lopsided(gap):
    """Each query scores the first key by `gap` powers of two above its own, which is zero."""
    q, k, v = (0 * x for x in arrays(40, 2, 2))
    q = q.at[:, 1:, :, 0].set(gap * math.log(2) / SCALE)
    return q, k.at[:, 0, :, 0].set(1.0), jax.random.normal(jax.random.key(3), v.shape)


@pytest.mark.usefixtures("prefix_forbidden")
@pytest.mark.parametrize("gap", [-1000.0, -100.0, 100.0, 140.0])
def test_scores_far_from_a_querys_own_are_exact(gap):
    assert_same_values(*lopsided(gap), AttentionMask(True))


@pytest.mark.parametrize("gap", [150.0, 1000.0])
def test_where_sums_grow_too_great_it_is_prefix(gap):
    q, k, v = lopsided(gap)
    sums = shifted_attention._sums(q, k, v, AttentionMask(True), scale=SCALE, numerics=numerics("float32"))
    assert not sums[..., -1].max() < MOST
    assert_same_values(q, k, v, AttentionMask(True))


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0xFFFFFFFF])
def test_what_is_not_a_number_stays_so(bits):
    """Of any bits: those of a query in one row, of a key in another."""
    nan = np.array(bits, np.uint32).view(np.float32)
    q, k, v = arrays(40, 2, 2, B=3)
    q, k = (jnp.asarray(place(np.array(x), nan)) for x, place in ((q, put_query), (k, put_key)))
    o, wanted = (compute(back_end, q, k, v, AttentionMask(True)) for back_end in (attend_shifted, attend))
    np.testing.assert_array_equal(jnp.isnan(o), jnp.isnan(wanted))
    assert jnp.isnan(o[1, 20]).all() and jnp.isnan(o[2, 30:]).all() and not jnp.isnan(o[0]).any()


def put_query(q, value):
    q[1, 20] = value
    return q


def put_key(k, value):
    k[2, 30] = value
    return k


@pytest.mark.parametrize(("mask", "softcap"), [(AttentionMask(False), None), (AttentionMask(True), 2.0)])
def test_what_it_leaves_to_prefix(mask, softcap):
    assert_same_values(*arrays(40, 2, 2), mask, softcap=softcap)


def test_queries_that_begin_later_in_the_row():
    q, k, v = arrays(37, 2, 2, S=70)
    assert_same_values(q, k, v, AttentionMask(True, query_offset=33))


def test_gradients_are_the_references():
    assert_equals_reference(attend_shifted, *arrays(65, 4, 2), packed(2, 65, causal=True, window=20))
