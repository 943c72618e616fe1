"""Attention against a loop over queries, and its mask by gradient."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.nn.attention import AttentionMask, attend
from lm.nn.layers import Dropout
from lm.nn.matmul import numerics

from .gradients import assert_gradients_equal

B, T, N, H = 2, 7, 4, 6
SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 2, 0], [1, 2, 2, 2, 2, 3, 3]])


def heads(key_value_heads):
    shapes = [(B, T, N, H), (B, T, key_value_heads, H), (B, T, key_value_heads, H)]
    return [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


def one_by_one(q, k, v, allowed, cap=lambda score: score):
    """Softmax attention of every query alone, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    o = np.zeros_like(q)
    for b, t, n in np.ndindex(B, T, N):
        kv = n // (N // k.shape[2])
        keys = [s for s in range(T) if allowed(b, t, s)]
        scores = cap(np.array([q[b, t, n] @ k[b, s, kv] for s in keys]) * 0.3)
        weights = np.exp(scores - scores.max())
        o[b, t, n] = sum(w * v[b, s, kv] for w, s in zip(weights / weights.sum(), keys, strict=True))
    return o


def run(q, k, v, mask, dtype="float32", dropout=None, softcap=None):
    return attend(q, k, v, mask, scale=0.3, softcap=softcap, numerics=numerics(dtype), dropout=dropout)


@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_equals_one_query_at_a_time(key_value_heads, causal, segments):
    q, k, v = heads(key_value_heads)

    def allowed(b, t, s):
        return (s <= t or not causal) and (segments is None or segments[b, t] == segments[b, s])

    o = run(q, k, v, AttentionMask(causal, segments, segments))
    np.testing.assert_allclose(o, one_by_one(q, k, v, allowed), atol=2e-6)  # float32, other order of summation


def test_of_one_sequence_with_itself_it_is_the_textbooks():
    """With q = k = v = x and scale 1, token i becomes the mean of all x_j weighted by softmax(x_i . x_j)."""
    x_BT1H = jax.random.normal(jax.random.key(0), (1, 9, 1, 5))
    plain = {"softcap": None, "numerics": numerics("float32"), "dropout": None}
    o = attend(x_BT1H, x_BT1H, x_BT1H, AttentionMask(False), scale=1.0, **plain)
    x = np.asarray(x_BT1H, np.float64)[0, :, 0]
    weights = np.exp(x @ x.T)
    np.testing.assert_allclose(o[0, :, 0], weights / weights.sum(1, keepdims=True) @ x, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_window_and_softcap_equal_one_query_at_a_time(causal):
    q, k, v = heads(2)

    def allowed(b, t, s):
        return abs(t - s) < 3 and (s <= t or not causal) and SEGMENTS[b, t] == SEGMENTS[b, s]

    o = run(q, k, v, AttentionMask(causal, SEGMENTS, SEGMENTS, window=3), softcap=0.5)
    wanted = one_by_one(q, k, v, allowed, cap=lambda score: 0.5 * np.tanh(score / 0.5))
    np.testing.assert_allclose(o, wanted, atol=2e-6)  # float32, other order of summation
    assert np.abs(o - one_by_one(q, k, v, allowed)).max() > 1e-2, "the cap must bite at these scores"


@pytest.mark.parametrize("window", [None, 2, T])
def test_gradient_flows_only_where_the_mask_allows(window):
    q, k, v = heads(2)
    mask = AttentionMask(True, SEGMENTS, SEGMENTS, window=window)
    for b, t in np.ndindex(B, T):
        gk, gv = jax.grad(lambda k, v, b=b, t=t: run(q, k, v, mask)[b, t].sum(), argnums=(0, 1))(k, v)
        for gradient in (gk, gv):
            seen = np.abs(np.asarray(gradient)).sum((2, 3)) > 0
            wanted = np.zeros((B, T), bool)
            first = max(t + 1 - (window or T), 0)
            wanted[b, first : t + 1] = SEGMENTS[b, first : t + 1] == SEGMENTS[b, t]
            assert not (seen & ~wanted).any()
        assert (seen == wanted).all()


@pytest.mark.parametrize("window", [None, 2])
def test_query_offset_is_the_row_index_of_the_first_query(window):
    q, k, v = heads(4)
    whole = run(q, k, v, AttentionMask(True, SEGMENTS, SEGMENTS, window=window))
    last = run(q[:, 5:], k, v, AttentionMask(True, SEGMENTS[:, 5:], SEGMENTS, query_offset=5, window=window))
    np.testing.assert_allclose(last, whole[:, 5:], atol=1e-6)


def formula(q, k, v, mask):
    """Grouped heads, one by one, in float32."""
    group = N // k.shape[2]
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    heads = []
    for n in range(N):
        scores_BTS = 0.3 * jnp.einsum("bth,bsh->bts", q[:, :, n], k[:, :, n // group])
        weights = jnp.where(mask.dense(T, T), jnp.exp(scores_BTS), 0.0)
        weights /= weights.sum(-1, keepdims=True)
        heads.append(jnp.einsum("bts,bsh->bth", weights, v[:, :, n // group]))
    return jnp.stack(heads, axis=2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("key_value_heads", "mask"),
    [
        (4, AttentionMask(True)),
        (2, AttentionMask(True, SEGMENTS, SEGMENTS, window=3)),
        (1, AttentionMask(False, SEGMENTS, SEGMENTS)),
    ],
    ids=["causal", "grouped, packed, window", "one key/value head, packed, not causal"],
)
def test_gradients_are_the_formulas(key_value_heads, mask, dtype):
    operands = [x.astype(dtype) for x in heads(key_value_heads)]
    assert_gradients_equal(
        lambda q, k, v: run(q, k, v, mask, dtype), lambda q, k, v: formula(q, k, v, mask).astype(dtype), *operands
    )


def test_a_query_that_sees_nothing_is_finite():
    q, k, v = heads(4)
    mask = AttentionMask(True, jnp.full((B, T), 9), jnp.ones((B, T), jnp.int32))
    value, gradient = jax.value_and_grad(lambda q: run(q, k, v, mask).sum())(q)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_bfloat16_is_close():
    q, k, v = heads(2)
    mask = AttentionMask(True)
    low = run(*(x.astype(jnp.bfloat16) for x in (q, k, v)), mask, "bfloat16")
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(low, np.float32), run(q, k, v, mask), atol=3e-2)  # 8 bits of mantissa


def test_dropout_on_probabilities_keeps_the_mean():
    q, k, _ = heads(4)
    v = jnp.ones_like(k)
    mask, wide = AttentionMask(False), 400
    dropped = [
        run(q, k, v, mask, dropout=Dropout(0.25, jax.random.split(jax.random.key(i), B))).mean() for i in range(wide)
    ]
    assert abs(float(np.mean(dropped)) - 1) < 0.02
    assert float(np.std(dropped)) > 0


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="the barrier is gone when its CPU compiler forms fusions")
def test_no_product_of_the_backward_pass_is_computed_within_a_sum():
    """XLA's CPU library would do so: Σ do · o, which what is made of do · vᵀ reads."""
    shapes = [jax.ShapeDtypeStruct((2, 128, 4, 32), jnp.float32)] * 3

    def loss(q, k, v):
        return jnp.sum(run(q, k, v, AttentionMask(True), dtype="bfloat16") ** 2)

    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes).compile().as_text()
    computations = re.split(r"^}", text, flags=re.MULTILINE)
    products = [each for each in computations if " dot(" in each and not re.search("^ENTRY", each, re.MULTILINE)]
    assert products and not any(" reduce(" in each for each in products)
    within = [each for each in computations if not re.search("^ENTRY", each, re.MULTILINE)]
    assert not any(" multiply(" in each and " reduce(" in each for each in within), "JAX 0.12 would, of do · o"
