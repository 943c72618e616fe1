"""The cache: rings and parts equal the plain cache, which equals the whole row; beams move; for every shape of model of
both families."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.nn import decoder, language_model
from lm.nn.attention import AttentionMask
from lm.nn.cache import KeyValueCache
from lm.nn.source import Source

from ..conftest import PAIR_SHAPES, SHAPES, VOCABULARY, resolved
from .test_language_model import weights_of

pytestmark = pytest.mark.thorough

B, T, PROMPT, SLOTS = 2, 14, 6, 16
SEGMENTS = np.array([[1] * T, [0] * 3 + [1] * (T - 3)], np.int32)
POSITIONS = np.maximum(np.cumsum(SEGMENTS, axis=1) - 1, 0).astype(np.int32)
OPTIONS = {"constrain": language_model.unconstrained}


def ids(rows=B, length=T, seed=2):
    return np.asarray(jax.random.randint(jax.random.key(seed), (rows, length), 0, VOCABULARY))


def run(tree, tokens_BT, segments_BT, positions_BT, cache, memory, *, cfg):
    x_BTD, cache = language_model.forward_cached(
        tree, tokens_BT, segments_BT, positions_BT, cache, cfg=cfg, memory=memory, **OPTIONS
    )
    return language_model.logits(tree, x_BTD, cfg=cfg, **OPTIONS), cache


step = jax.jit(run, static_argnames="cfg")


def decoded(cfg, tree, windows, memory=None, part=None):
    """The logits of a prompt at once and of tokens one by one."""
    cache = KeyValueCache.empty(cfg.num_layers, B, SLOTS, cfg.kv_heads, cfg.head_width, "float32", windows, part)

    @jax.jit
    def prompt(cache, *arrays):
        return run(tree, *arrays, cache._replace(length=0), memory, cfg=cfg)

    found = []
    for low, high in ((0, PROMPT), *((at, at + 1) for at in range(PROMPT, T))):
        arrays = (ids()[:, low:high], SEGMENTS[:, low:high], POSITIONS[:, low:high])
        logits, cache = step(tree, *arrays, cache, memory, cfg=cfg) if low else prompt(cache, *arrays)
        found.append(logits)
    return np.concatenate(found, axis=1)[SEGMENTS == 1][:, :VOCABULARY], cache


@functools.partial(jax.jit, static_argnames="cfg")
def remembered(tree, source, *, cfg):
    memory_BSD = language_model.encode_source(tree, source, cfg=cfg, dropout_keys_B=None, **OPTIONS)
    return decoder.remember(tree["layers"], memory_BSD, source.segments_BS, cfg=cfg, **OPTIONS)


def windows_of(cfg):
    return [kind.window for kind in cfg.layer_pattern]


@pytest.mark.parametrize("shape", ["gpt2", "gemma"])
def test_cached_equals_the_whole_row(shape):
    cfg = resolved(SHAPES[shape])
    tree = weights_of(cfg)
    whole = jax.jit(language_model.apply, static_argnames="cfg")(tree, ids(), SEGMENTS, POSITIONS, cfg=cfg)
    whole = np.asarray(whole)[SEGMENTS == 1][:, :VOCABULARY]
    plain, _ = decoded(cfg, tree, [None])
    np.testing.assert_allclose(plain, whole, atol=1e-4)  # another order of float32 sums


@pytest.mark.parametrize("shape", sorted(PAIR_SHAPES))
def test_cached_equals_the_whole_row_of_an_encoder_decoder(shape):
    cfg = resolved(PAIR_SHAPES[shape])
    tree = weights_of(cfg)
    tokens_BS = ids(length=9, seed=5) % 47
    seen_BS = (np.arange(9)[None] < np.array([[9], [4]])).astype(np.int32)
    source = Source(tokens_BS, seen_BS, np.broadcast_to(np.arange(9, dtype=np.int32), (B, 9)))
    apply = jax.jit(language_model.apply, static_argnames="cfg")
    whole = np.asarray(apply(tree, ids(), SEGMENTS, POSITIONS, cfg=cfg, source=source))[SEGMENTS == 1][:, :VOCABULARY]
    memory = remembered(tree, source, cfg=cfg)
    rings = [None] if cfg.positions == "relative" else windows_of(cfg)
    for windows in {tuple(rings), (None,)}:
        found, _ = decoded(cfg, tree, windows, memory)
        np.testing.assert_allclose(found, whole, atol=1e-4)
    other, _ = decoded(cfg, tree, [None], memory._replace(segments_BS=np.ones_like(seen_BS)))
    assert np.abs(other - whole).max() > 1e-3


@pytest.mark.parametrize("window", [(4, None), 3, (8, 5, 1)])
def test_a_ring_equals_the_plain_cache(window):
    """Of prompts longer and shorter than it, padded on the left; each layer has as many slots as its window."""
    import dataclasses

    cfg = dataclasses.replace(resolved(SHAPES["gemma"]), window=window)
    tree = weights_of(cfg)
    plain, held = decoded(cfg, tree, [None])
    rings, less = decoded(cfg, tree, windows_of(cfg))
    np.testing.assert_allclose(rings, plain, atol=1e-5)
    wanted = [windows_of(cfg)[i % len(windows_of(cfg))] or SLOTS for i in range(cfg.num_layers)]
    assert [sum(x.shape[2] for x in parts) for parts in less.keys] == wanted
    assert [sum(x.shape[2] for x in parts) for parts in held.keys] == [SLOTS] * cfg.num_layers
    wider = dataclasses.replace(cfg, window=tuple(w and w + 1 for w in windows_of(cfg)))
    assert np.abs(decoded(wider, tree, windows_of(wider))[0] - plain).max() > 1e-3


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_parts_equal_the_plain_cache(shape):
    """Parts within the prompt, at its end and behind it, the last one shorter; beside rings, too."""
    cfg = resolved(SHAPES[shape])
    tree = weights_of(cfg)
    plain, _ = decoded(cfg, tree, [None])
    windows = windows_of(cfg)
    for part, kept in ((3, [None]), (4, [None]), (5, windows)):
        found, held = decoded(cfg, tree, kept, part=part)
        np.testing.assert_allclose(found, plain, atol=1e-5)
        rings = [len(held.keys[i]) == 1 for i in range(cfg.num_layers)]
        assert rings == [kept[i % len(kept)] is not None for i in range(cfg.num_layers)]


@pytest.mark.parametrize("shape", sorted(PAIR_SHAPES))
def test_parts_equal_the_plain_cache_of_an_encoder_decoder(shape):
    """Relative positions, too, which are added to scores."""
    cfg = resolved(PAIR_SHAPES[shape])
    tree = weights_of(cfg)
    tokens_BS = ids(length=9, seed=5) % 47
    positions_BS = np.broadcast_to(np.arange(9, dtype=np.int32), (B, 9))
    memory = remembered(tree, Source(tokens_BS, np.ones_like(tokens_BS), positions_BS), cfg=cfg)
    plain, _ = decoded(cfg, tree, [None], memory)
    np.testing.assert_allclose(decoded(cfg, tree, [None], memory, part=4)[0], plain, atol=1e-5)


def test_a_part_that_holds_nothing_is_not_read():
    cfg = resolved(SHAPES["gpt2"])
    tree = weights_of(cfg)
    _, cache = decoded(cfg, tree, [None], part=4)
    room = KeyValueCache.empty(cfg.num_layers, B, SLOTS + 8, cfg.kv_heads, cfg.head_width, "float32", part=4)

    def with_room(held, room):
        poisoned = [[jnp.full_like(x, jnp.nan) for x in parts[4:]] for parts in room]
        return tuple((*parts, *more) for parts, more in zip(held, poisoned, strict=True))

    longer = cache._replace(
        keys=with_room(cache.keys, room.keys),
        values=with_room(cache.values, room.values),
        segments_BS=jnp.pad(cache.segments_BS, ((0, 0), (0, 8))),
    )
    for turn in range(3):  # slots 14 and 15, and the first of the next part
        token = (ids()[:, turn : turn + 1], np.ones((B, 1), np.int32), POSITIONS[:, -1:] + 1 + turn)
        if turn < 2:
            wanted, cache = step(tree, *token, cache, None, cfg=cfg)
        got, longer = step(tree, *token, longer, None, cfg=cfg)
        if turn < 2:
            np.testing.assert_allclose(got, wanted, atol=1e-6)
    assert not np.isfinite(got).all(), "that part is read"


def filled(windows, part=None):
    cache = KeyValueCache.empty(2, 4, 8, 1, 2, "float32", windows, part)
    new = jnp.arange(4 * 6 * 2, dtype=jnp.float32).reshape(4, 6, 1, 2)
    cache = cache.mark(jnp.ones((4, 6), jnp.int32))
    for layer in range(2):
        cache = cache.see(layer, new, new + 100, AttentionMask(True))[0]
    return cache.advance(6)


def whole(parts):
    return np.concatenate(parts, axis=2)


@pytest.mark.parametrize("part", [None, 1, 2, 5])
def test_rows_move_but_for_what_they_have_in_common(part):
    cache = filled((None, 4), part)
    moved = cache.reorder(jnp.array([1, 1, 3, 0]), 3)
    for held, other in ((cache.keys[0], moved.keys[0]), (cache.values[0], moved.values[0])):
        before, after = whole(held), whole(other)
        np.testing.assert_array_equal(after[:, :, :3], before[:, :, :3])
        np.testing.assert_array_equal(after[:, :, 3:6], before[np.array([1, 1, 3, 0]), :, 3:6])
    np.testing.assert_array_equal(moved.keys[1][0], cache.keys[1][0][np.array([1, 1, 3, 0])])
    twice = cache.repeat(2)
    np.testing.assert_array_equal(whole(twice.keys[1])[5], whole(cache.keys[1])[2])
    assert twice.segments_BS.shape == (8, 8) and twice.rings[4].shape == (8, 4)


def test_a_ring_holds_the_last_tokens():
    """Token i in slot i modulo 4."""
    ring = np.asarray(filled((4,)).keys[0][0])[0, 0, :, 0]
    np.testing.assert_array_equal(ring, [8, 10, 4, 6])
