"""The stack against a plain NumPy one in float64, and layers that differ by a pattern."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import DataConfig, LayerKind, ModelConfig, RunConfig
from lm.nn import language_model, params
from lm.nn.attention import AttentionMask, attend
from lm.nn.encoder import encode

from ..conftest import SHAPES, VOCABULARY, resolved
from .test_language_model import POSITIONS, SEGMENTS, B, T, apply, tokens, weights_of

GEMMA = SHAPES["gemma"]


def rms(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * (1 + scale)


def frequencies(kind, llama3):
    """Gemma's of one kind of layer: a head is 10 wide, and 5 pairs turn."""
    frequency = kind.rotary_base ** (-np.arange(5) / 5)
    if not llama3:
        return frequency / kind.rotary_factor
    share = np.clip((24 * frequency / (2 * np.pi) - 1) / (4 - 1), 0, 1)
    return share * frequency + (1 - share) * frequency / kind.rotary_factor


def turned(x_BTNH, frequency):
    z = (x_BTNH[..., :5] + 1j * x_BTNH[..., 5:]) * np.exp(1j * np.asarray(POSITIONS)[..., None, None] * frequency)
    return np.concatenate([z.real, z.imag], -1)


def one_layer(p, x, kind, llama3):
    """A layer of the gemma shape: 4 query heads that share 2 key/value heads, each of width 10."""
    y = rms(x, p["attention_norm"]["scale"])
    qkv = np.einsum("btd,dke->btke", y, p["attention"]["qkv"]) + p["attention"]["qkv_bias"]
    q, k, v = qkv[..., :20].reshape(B, T, 4, 10), qkv[..., 20:30], qkv[..., 30:]
    q, k = (rms(part, p["attention"][name]["scale"]) for part, name in ((q, "q_norm"), (k, "k_norm")))
    q, k = (turned(part, frequencies(kind, llama3)) for part in (q, k))
    scores = 2.0 * np.tanh(0.4 * np.einsum("btnh,bsnh->bnts", q, k.repeat(2, axis=2)) / 2.0)
    t, s = np.mgrid[:T, :T]
    segments = np.asarray(SEGMENTS)
    seen = (s <= t) & (t - s < (kind.window or T)) & (segments[:, :, None] == segments[:, None, :])
    weights = np.exp(scores) * seen[:, None]
    o = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v.repeat(2, axis=2))
    x = x + rms(np.einsum("btnh,nhd->btd", o, p["attention"]["out"]), p["attention_output_norm"]["scale"])
    y, f = rms(x, p["feed_forward_norm"]["scale"]), p["feed_forward"]
    gate = y @ f["gate"]
    gate = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    return x + rms((gate * (y @ f["up"])) @ f["down"], p["feed_forward_output_norm"]["scale"])


@pytest.mark.parametrize("llama3", [False, True])
def test_equals_numpy(llama3):
    change = {"rotary_scaling": "llama3", "rotary_original_positions": 24} if llama3 else {}
    cfg = resolved(dataclasses.replace(GEMMA, **change))
    tree = weights_of(cfg)
    got = apply(tree, tokens(), SEGMENTS, POSITIONS, cfg=cfg)[..., :VOCABULARY]
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)
    x = p["embed"]["tokens"][tokens()] * np.sqrt(32)
    for index in range(3):
        kind = LayerKind((4, None, 4)[index], (1e2, 1e4, 1e2)[index], (1.0, 4.0, 1.0)[index])
        x = one_layer(jax.tree.map(lambda leaf, i=index: leaf[i], p["layers"]), x, kind, llama3)
    wanted = (rms(x, p["norm"]["scale"]) @ p["embed"]["tokens"].T)[..., :VOCABULARY]
    np.testing.assert_allclose(got, wanted, atol=2e-5)  # float32, three layers


def test_windows_add_up_over_the_layers():
    """By gradient: through three layers with windows of 3 a token sees the last 3 · 2 + 1, and no more."""
    cfg = resolved(dataclasses.replace(GEMMA, window=3, rotary_base=1e2, rotary_factor=1.0, scan_layers=True))
    tree = weights_of(cfg)
    x_BTD = jax.random.normal(jax.random.key(0), (1, T, 32))

    def stack(x_BTD):
        mask = AttentionMask(causal=True)
        positions = jnp.arange(T)[None]
        constrain = language_model.unconstrained
        y, _ = encode(
            tree["layers"], x_BTD, positions, mask, None, cfg=cfg, dropout=None, constrain=constrain, attend=attend
        )
        return y[0] @ jax.random.normal(jax.random.key(5), (32,))

    seen = np.abs(jax.jit(jax.jacrev(stack))(x_BTD)).max(-1)[:, 0] > 0
    t, s = np.mgrid[:T, :T]
    np.testing.assert_array_equal(seen, (s <= t) & (t - s <= 6))


def test_the_scan_takes_whole_patterns_and_leaves_the_rest():
    cfg = resolved(dataclasses.replace(GEMMA, num_layers=5))
    tree = weights_of(cfg)
    scanned = apply(tree, tokens(), SEGMENTS, POSITIONS, cfg=dataclasses.replace(cfg, scan_layers=True))
    np.testing.assert_allclose(scanned, apply(tree, tokens(), SEGMENTS, POSITIONS, cfg=cfg), atol=1e-5)


def test_layers_take_the_entries_of_a_pattern_in_turn():
    cfg = dataclasses.replace(GEMMA, num_layers=7, window=(8, None), rotary_base=(1.0, 2.0, 2.0), rotary_factor=1.0)
    entries = [(8, 1.0), (None, 2.0), (8, 2.0), (None, 1.0), (8, 2.0), (None, 2.0)]
    assert cfg.layer_pattern == tuple(LayerKind(window, base, 1.0) for window, base in entries)
    assert dataclasses.replace(cfg, num_layers=2).layer_pattern == cfg.layer_pattern[:2]
    whole = dataclasses.replace(cfg, window=(8, None, 8, None, 8, None, 8), rotary_base=1.0)  # told layer by layer
    assert whole.layer_pattern == (LayerKind(8, 1.0, 1.0), LayerKind(None, 1.0, 1.0))
    assert dataclasses.replace(cfg, window=(8, 8), rotary_base=1.0).layer_pattern == (LayerKind(8, 1.0, 1.0),)


def test_a_norm_with_offset_is_drawn_as_one_without():
    cfg = resolved(dataclasses.replace(GEMMA, num_layers=1))
    tree = params.initialize(language_model.model_specs(cfg), jax.random.key(0))
    plain = dataclasses.replace(cfg, norm_offset=False)
    other = params.initialize(language_model.model_specs(plain), jax.random.key(0))
    assert not tree["norm"]["scale"].any() and not tree["layers"]["attention"]["q_norm"]["scale"].any()
    np.testing.assert_allclose(apply(tree, tokens(), cfg=cfg), apply(other, tokens(), cfg=plain), rtol=1e-6)


SWITCHES = {
    "window": 2,
    "rotary_base": 50.0,
    "rotary_factor": 3.0,
    "rotary_scaling": "llama3",
    "rotary_low_frequency_factor": 0.1,
    "rotary_high_frequency_factor": 2.0,
    "rotary_original_positions": 20,
    "attention_scale": None,
    "attention_softcap": None,
    "qkv_bias": None,
    "norm_position": "pre",
    "activation": "swiglu",
}


@pytest.mark.parametrize("field", SWITCHES)
def test_every_switch_changes_the_numbers(field):
    """A config field that no code reads is a bug."""
    one = dataclasses.replace(GEMMA, num_layers=1, window=None, rotary_base=10.0, rotary_factor=2.0)
    if field.endswith(("_factor", "_positions")) and field != "rotary_factor":
        one = dataclasses.replace(one, rotary_scaling="llama3", rotary_original_positions=40)
    one = resolved(one)
    other = dataclasses.replace(one, **{field: SWITCHES[field]})

    def result(cfg):
        return apply(weights_of(cfg), tokens(), cfg=cfg)[..., :VOCABULARY]

    assert np.abs(result(one) - result(other)).max() > 1e-4


@pytest.mark.parametrize("window", [None, (4, None)])
def test_a_scan_does_not_copy_the_stack(window):
    """Of the whole stack it holds a group of layers at a time, as the compiler plans its memory."""
    layers = 16
    cfg = ModelConfig(num_layers=layers, d_model=128, num_heads=4, scan_layers=True, window=window, vocab_size=8)
    cfg = RunConfig(model=cfg, data=DataConfig(context=8)).resolve(8).model
    shapes = jax.eval_shape(lambda: params.initialize(language_model.model_specs(cfg), jax.random.key(0)))
    ids = jax.ShapeDtypeStruct((1, 8), np.int32)
    run = jax.jit(lambda tree, ids: language_model.apply(tree, ids, cfg=cfg))
    used = run.lower(shapes, ids).compile().memory_analysis().temp_size_in_bytes
    stack = sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes["layers"]))
    assert used < stack / layers * 4
