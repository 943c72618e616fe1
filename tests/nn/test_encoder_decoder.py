"""The encoder–decoder: what a target may see, its cross-attention and its positions, against textbook NumPy."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.nn import language_model, params
from lm.nn.attention import AttentionMask, attend
from lm.nn.decoder import cross_specs, reading_states
from lm.nn.language_model import unconstrained
from lm.nn.matmul import numerics
from lm.nn.relative import relative_bias
from lm.nn.source import Source

from ..conftest import PAIR_SHAPES, VOCABULARY, resolved

pytestmark = pytest.mark.thorough

PAIRS = [(5, 4), (3, 6), (1, 2), (4, 1)]
"""Ids of each source, and of its target."""
SOURCES = 47
"""Ids below this are in both vocabularies."""


def weights_of(cfg, seed=0):
    """Drawn, and moved a little: norms and biases that are ones and zeros show no mistake."""
    tree = params.initialize(language_model.model_specs(cfg), jax.random.key(seed))
    leaves, form = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    moved = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(form, moved)


def rows_of(pairs, T, S):
    """(tokens, targets, weights, segments, positions), source: one row with these pairs side by side, padded."""
    draws = [np.random.default_rng(number) for number in range(len(PAIRS))]
    texts = [(draw.integers(0, SOURCES, s), draw.integers(0, VOCABULARY, t + 1)) for draw, (s, t) in zip(
        draws, PAIRS, strict=True)]  # fmt: skip
    own, source = np.zeros((5, 1, T)), np.zeros((3, 1, S))
    t = s = 0
    for segment, number in enumerate(pairs, 1):
        ids, target = texts[number]
        length = len(target) - 1
        own[:, 0, t : t + length] = target[:-1], target[1:], np.ones(length), np.full(length, segment), range(length)
        source[:, 0, s : s + len(ids)] = ids, np.full(len(ids), segment), range(len(ids))
        t, s = t + length, s + len(ids)
    tokens, targets, weights, segments, positions = own
    whole = [array.astype(np.int32) for array in (tokens, targets, segments, positions)]
    return (whole[0], whole[1], weights.astype(np.float32), *whole[2:]), Source(*source.astype(np.int32))


def sums(tree, rows, source, cfg, **more):
    return language_model.loss(
        tree, *rows, cfg=cfg, z_loss=None, dropout_keys_B=None, constrain=unconstrained, source=source, **more
    )


def test_a_packed_row_is_the_pairs_alone_and_every_parameter_learns(pair_model):
    """1e-5: another order of sums. Positions of every kind begin anew in each pair, and no pair sees another."""
    cfg = pair_model
    tree = weights_of(cfg)
    every = range(len(PAIRS))

    @jax.jit
    def of_row(tree, rows, source):
        return jax.value_and_grad(sums, has_aux=True)(tree, rows, source, cfg)

    (_, packed), gradients = of_row(tree, *rows_of(every, 17, 16))
    alone = [of_row(tree, *rows_of([number], 17, 16))[0][1] for number in every]
    np.testing.assert_allclose(packed, sum(alone), rtol=1e-5)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.abs(gradient).max() > 1e-7, jax.tree_util.keystr(path)
    # what a pair has for a source moves its own loss and no other's
    rows, source = rows_of(every, 17, 16)
    other = source._replace(tokens_BS=np.where(source.segments_BS == 1, 46 - source.tokens_BS, source.tokens_BS))

    @jax.jit
    def each_of(tree, rows, source):
        how = {"cfg": cfg, "dropout_keys_B": None, "constrain": unconstrained}
        return language_model.nll(tree, rows[0], rows[1], *rows[3:], **how, source=source)

    each, moved = (np.asarray(each_of(tree, rows, one)) for one in (source, other))
    first, rest = rows[3] == 1, rows[3] > 1
    assert np.abs(each - moved)[first].min() > 1e-4
    np.testing.assert_array_equal(each[rest], moved[rest])


@pytest.mark.parametrize("name", ["t5", "grouped"])
def test_scanned_and_recomputed_layers_are_the_unrolled_ones(name):
    """1e-5 of the largest entry of a gradient: the same sums, in another program."""
    cfg = resolved(PAIR_SHAPES[name])
    tree = weights_of(cfg)
    rows = rows_of(range(3), 14, 12)
    found = []
    for scan in (False, True):
        one = dataclasses.replace(cfg, scan_layers=scan, remat=scan)
        found.append(jax.jit(lambda tree, one=one: jax.value_and_grad(sums, has_aux=True)(tree, *rows, one))(tree))
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-6)
    for a, b in zip(*(jax.tree.leaves(each[1]) for each in found), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_cross_attention_is_the_textbooks():
    """softmax(q kᵀ / sqrt(H)) v by loops in float64, over grouped heads: a query sees the source of its own segment."""
    cfg = resolved(dataclasses.replace(PAIR_SHAPES["grouped"], qk_norm=False, attention_softcap=None))
    p = params.initialize({"cross_attention": cross_specs(cfg)["cross_attention"]}, jax.random.key(0))[
        "cross_attention"
    ]
    p = {name: leaf + 0.3 * jax.random.normal(jax.random.key(5), leaf.shape) for name, leaf in p.items()}
    x_BTD, memory_BSD = (jax.random.normal(jax.random.key(n), (2, n, 32)) for n in (6, 9))
    ours = np.array([[1, 1, 2, 2, 3, 0], [1, 1, 1, 1, 2, 2]])
    theirs = np.array([[1, 2, 2, 2, 3, 3, 0, 0, 0], [1, 1, 1, 1, 1, 1, 2, 0, 0]])
    block = reading_states(
        memory_BSD, jnp.asarray(theirs), jnp.asarray(ours), cfg=cfg, constrain=unconstrained, attend=attend
    )
    got = block.run(p, x_BTD, 0, None)

    q, kv, out, q_bias, kv_bias = (np.asarray(p[n], np.float64) for n in ("q", "kv", "out", "q_bias", "kv_bias"))
    H, wanted = cfg.head_width, np.zeros((2, 6, 32))
    for b, t in np.argwhere(ours > 0):
        seen = np.asarray(memory_BSD, np.float64)[b, theirs[b] == ours[b, t]]
        for n in range(4):
            key, value = np.split(seen @ kv[:, n // 2] + kv_bias[n // 2], [H], axis=1)
            query = np.asarray(x_BTD, np.float64)[b, t] @ q[:, n] + q_bias[n]
            e = np.exp(key @ query / math.sqrt(H))
            wanted[b, t] += (e / e.sum() @ value) @ out[n]
    real = ours > 0
    np.testing.assert_allclose(got[real], wanted[real], atol=1e-5)


def bucket(distance, *, both, buckets, most):
    """By hand, for one distance key - query (Raffel et al. 2020): exact when near, logarithmic when far."""
    side = buckets // 2 if both else buckets
    base = side if both and distance > 0 else 0
    away = abs(distance) if both else max(-distance, 0)
    if away < side // 2:
        return base + away
    return base + min(
        side - 1, side // 2 + int(math.log(away / (side // 2)) / math.log(most / (side // 2)) * (side - side // 2))
    )


@pytest.mark.parametrize("both", [True, False])
def test_relative_positions_are_the_naive_ones(both):
    table_RN = jax.random.normal(jax.random.key(0), (8, 3))
    got = relative_bias(table_RN, 5, 40, offset=30, bidirectional=both, max_distance=13)
    for t in range(5):
        for s in range(40):
            row = bucket(s - (30 + t), both=both, buckets=8, most=13)
            np.testing.assert_array_equal(got[:, t, s], table_RN[row], err_msg=f"{t} {s}")


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_bias_is_added_to_scores_and_learns(softcap):
    """Values and all four gradients against autodiff of the formula itself; 1e-5."""
    q, k, v = (jax.random.normal(jax.random.key(n), (2, length, heads, 8)) for n, length, heads in (
        (0, 5, 4), (1, 7, 2), (2, 7, 2)))  # fmt: skip
    bias_NTS = jax.random.normal(jax.random.key(3), (4, 5, 7))

    def ours(q, k, v, bias):
        mask = AttentionMask(causal=False)
        return attend(
            q, k, v, mask, scale=0.3, softcap=softcap, numerics=numerics("float32"), dropout=None, bias_NTS=bias
        )

    def plain(q, k, v, bias):
        scores = 0.3 * jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, 2, axis=2)) + bias[None]
        scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), jnp.repeat(v, 2, axis=2))

    weights = jax.random.normal(jax.random.key(4), (2, 5, 4, 8))
    got, wanted = (
        jax.value_and_grad(lambda *x, f=f: jnp.sum(f(*x) * weights), argnums=(0, 1, 2, 3))(q, k, v, bias_NTS)
        for f in (ours, plain)
    )
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-5)
    for a, b in zip(got[1], wanted[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert np.abs(ours(q, k, v, bias_NTS) - ours(q, k, v, None)).max() > 0.1


def test_a_wrong_family_is_named(pair_model):
    with pytest.raises(ValueError, match="'encoder_decoder' needs a source"):
        language_model.apply(weights_of(pair_model), jnp.ones((1, 3), jnp.int32), cfg=pair_model)
