"""The whole model: what a token may see, proved by gradient, and the forms that must give the same numbers."""

from __future__ import annotations

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.model import LM
from lm.nn import language_model, params
from lm.nn.cache import KeyValueCache

from ..conftest import SHAPES, VOCABULARY, resolved

B, T = 2, 12
SEGMENTS = jnp.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 2 + [2] * 7 + [3] * 3])
POSITIONS = jnp.array([[*range(5), *range(4), *range(3)], [*range(2), *range(7), *range(3)]])


apply = jax.jit(language_model.apply, static_argnames="cfg")
MOST_PARTS = ("gemma", "modern", "tutorial")
"""Of the shapes those that have most kinds of layers among them: for tests that compile gradients again and again."""


def weights_of(cfg, seed=0):
    """Random parameters, none at its initial 0 or 1, in dicts of its own."""
    return jax.tree.map(lambda leaf: leaf, _weights_of(cfg, seed))


@functools.cache
def _weights_of(cfg, seed):
    tree = params.initialize(language_model.model_specs(cfg), jax.random.key(seed))

    def noisy(path, leaf):  # with a key from its path: another leaf beside it changes nothing
        key = jax.random.fold_in(jax.random.key(seed + 1), zlib.crc32(jax.tree_util.keystr(path).encode()))
        return leaf + 0.05 * jax.random.normal(key, leaf.shape)

    return jax.tree_util.tree_map_with_path(noisy, tree)


def tokens(seed=2, shape=(B, T)):
    return jax.random.randint(jax.random.key(seed), shape, 0, VOCABULARY)


@functools.partial(jax.jit, static_argnums=0)
def losses(cfg, tree, tokens_BT, targets_BT, segments_BT, positions_BT, keys_B=None):
    return language_model.nll(
        tree, tokens_BT, targets_BT, segments_BT, positions_BT,
        cfg=cfg, dropout_keys_B=keys_B, constrain=language_model.unconstrained,
    )  # fmt: skip


def total_and_gradient(cfg, tree, keys_B=None):
    def total(tree):
        return losses(cfg, tree, tokens(), tokens(3), SEGMENTS, POSITIONS, keys_B).sum()

    return jax.jit(jax.value_and_grad(total))(tree)


def assert_close(got, wanted, tolerance):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        scale = max(float(jnp.abs(b).max()), 1e-3)
        np.testing.assert_allclose(a, b, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))


@pytest.mark.thorough
def test_no_token_sees_the_future_or_another_document(model):
    """The gradient of every position's logits by every input embedding, through the whole stack."""
    tree = weights_of(model)
    table = tree["embed"]["tokens"]
    # Every position gets a row of the table to itself, so that its gradient says which positions were read.
    rows_BT = jnp.arange(B * T).reshape(B, T)
    tree["embed"]["tokens"] = jax.random.normal(jax.random.key(0), (model.padded_vocabulary, model.d_model))
    tree.setdefault("head", {}).setdefault("kernel", table.T)  # the head of its own: it must not read the table too

    def logits(table):
        own = {**tree, "embed": {**tree["embed"], "tokens": table}}
        return apply(own, rows_BT, SEGMENTS, POSITIONS, cfg=model)[..., :VOCABULARY]

    # Σ over the vocabulary with random signs: a single scalar a position, whose gradient is nowhere zero by accident
    signs = jax.random.normal(jax.random.key(5), (VOCABULARY,))
    gradient = jax.jit(jax.jacrev(lambda table: logits(table) @ signs))(tree["embed"]["tokens"])
    seen = (jnp.abs(gradient).max(-1) > 0)[..., : B * T].reshape(B, T, B, T)
    for b, t in np.ndindex(B, T):
        wanted = np.zeros((B, T), bool)
        wanted[b, : t + 1] = SEGMENTS[b, : t + 1] == SEGMENTS[b, t]
        np.testing.assert_array_equal(seen[b, t], wanted)


@pytest.mark.thorough
def test_a_packed_row_equals_its_pieces_alone(model):
    tree = weights_of(model)
    tokens_BT, targets_BT = tokens(), tokens(3)
    packed = losses(model, tree, tokens_BT, targets_BT, SEGMENTS, POSITIONS)
    for b, begin, end in [(0, 0, 5), (0, 5, 9), (1, 2, 9)]:
        alone = (slice(b, b + 1), slice(begin, end))
        piece = losses(model, tree, tokens_BT[alone], targets_BT[alone], None, jnp.arange(end - begin)[None])
        np.testing.assert_allclose(packed[alone], piece, rtol=1e-5, atol=1e-5)  # float32, other order of summation
    blind = losses(model, tree, tokens_BT, targets_BT, None, POSITIONS)
    assert np.abs(blind - packed)[1, 3:].max() > 1e-3, "without segments the pieces see one another"


@pytest.mark.thorough
@pytest.mark.parametrize("model", MOST_PARTS, indirect=True)
def test_scanned_unrolled_and_remat_agree(model):
    keys_B = jax.random.split(jax.random.key(9), B)
    model = dataclasses.replace(model, dropout=0.2)
    tree = weights_of(model)
    value, gradient = total_and_gradient(model, tree, keys_B)
    for change in ({"scan_layers": True}, {"remat": True}):
        again, other = total_and_gradient(dataclasses.replace(model, **change), tree, keys_B)
        np.testing.assert_allclose(again, value, rtol=1e-6)  # same graph, float32
        assert_close(other, gradient, 1e-5)
    assert abs(total_and_gradient(dataclasses.replace(model, dropout=0.0), tree)[0] - value) > 1e-2


@pytest.mark.thorough
@pytest.mark.parametrize("model", MOST_PARTS, indirect=True)
def test_bfloat16_and_tensorfloat32_are_close(model):
    tree = weights_of(model)
    value, gradient = total_and_gradient(model, tree)
    low, low_gradient = total_and_gradient(dataclasses.replace(model, compute_dtype="bfloat16"), tree)
    assert abs(low - value) / value < 1e-2
    assert abs(low - value) > 0, "bfloat16 must not compute in float32"
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(low_gradient))
    # In norm, since a ReLU near 0 may switch under rounding; 8 bits of mantissa through two layers and back.
    for a, b in zip(jax.tree.leaves(low_gradient), jax.tree.leaves(gradient), strict=True):
        assert float(jnp.linalg.norm((a - b).ravel())) < 0.1 * float(jnp.linalg.norm(b.ravel())) + 1e-4
    third, _ = total_and_gradient(dataclasses.replace(model, compute_dtype="tensorfloat32"), tree)
    np.testing.assert_allclose(third, value, rtol=1e-3)  # on a CPU it is float32


def test_padding_of_the_vocabulary_changes_nothing(model):
    wide = dataclasses.replace(model, vocab_multiple=100)
    assert wide.padded_vocabulary == 100
    tree, narrow = weights_of(wide), dataclasses.replace(model, vocab_multiple=1)
    logits = apply(tree, tokens(), cfg=wide)
    assert (logits[..., VOCABULARY:] == -jnp.inf).all() and jnp.isfinite(logits[..., :VOCABULARY]).all()
    tree["embed"]["tokens"] = tree["embed"]["tokens"][:VOCABULARY]
    for name, axis in (("kernel", 1), ("bias", 0)):
        if name in tree.get("head", {}):
            tree["head"][name] = jnp.take(tree["head"][name], jnp.arange(VOCABULARY), axis=axis)
    np.testing.assert_allclose(apply(tree, tokens(), cfg=narrow), logits[..., :VOCABULARY], atol=1e-5)


forward_cached = jax.jit(language_model.forward_cached, static_argnames=("cfg", "constrain"))


@pytest.mark.thorough
def test_cached_decoding_equals_the_whole_row(model):
    tree = weights_of(model)
    whole = apply(tree, tokens(), cfg=model)[..., :VOCABULARY]
    cache = KeyValueCache.empty(model.num_layers, B, 16, model.kv_heads, model.head_width, "float32")
    for cfg in (model, dataclasses.replace(model, scan_layers=True)):
        filled, begin = cache, 0
        for count in (5, 1, 1, 3, 1, 1):
            part = slice(begin, begin + count)
            x_BTD, filled = forward_cached(
                tree,
                tokens()[:, part],
                jnp.ones((B, count), jnp.int32),
                jnp.broadcast_to(jnp.arange(begin, begin + count), (B, count)),
                filled,
                cfg=cfg,
                constrain=language_model.unconstrained,
            )
            logits = language_model.logits(tree, x_BTD, cfg=cfg, constrain=language_model.unconstrained)
            np.testing.assert_allclose(logits[..., :VOCABULARY], whole[:, part], atol=1e-4)
            begin += count


def test_the_flax_module_is_the_pure_function(model):
    module = LM(model)
    variables = module.init(jax.random.key(0), tokens())
    specs = language_model.model_specs(model)
    assert jax.tree.structure(variables["params"]) == jax.tree.structure(params.map_specs(lambda _: 0, specs))
    out = module.apply(variables, tokens(), SEGMENTS, POSITIONS)
    pure = language_model.apply(variables["params"], tokens(), SEGMENTS, POSITIONS, cfg=model)
    np.testing.assert_array_equal(out, pure)


def test_every_layer_is_drawn_with_its_own_key(model):
    tree = params.initialize(language_model.model_specs(model), jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree["layers"]):
        if not (jnp.all(leaf == 0) or jnp.all(leaf == 1)):
            assert not np.array_equal(leaf[0], leaf[1]), jax.tree_util.keystr(path)


def test_softcap_bounds_the_logits(model):
    tree = jax.tree.map(lambda w: w * 30, weights_of(model))
    capped = apply(tree, tokens(), cfg=dataclasses.replace(model, logit_softcap=2.0))
    assert jnp.abs(capped[..., :VOCABULARY]).max() <= 2.0


@pytest.mark.parametrize("field", ["qk_norm", "embedding_scale", "bias", "tie_embeddings"])
def test_every_switch_changes_the_numbers(field):
    """A config field that no code reads is a bug."""
    model = resolved(SHAPES["gpt2"])
    other = dataclasses.replace(model, **{field: not getattr(model, field)})

    def result(cfg):
        return apply(weights_of(cfg), tokens(), cfg=cfg)[..., :VOCABULARY]

    assert np.abs(result(model) - result(other)).max() > 1e-4
