"""The preset torch_tutorial is the classic tutorial's model, built on torch.nn.TransformerEncoder."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import jax  # noqa: E402
from scipy import stats  # noqa: E402

import lm  # noqa: E402
from lm.interop import torch_transformer  # noqa: E402
from lm.interop.huggingface_config import arithmetic  # noqa: E402
from lm.nn import params as declare  # noqa: E402
from lm.nn.language_model import model_specs  # noqa: E402

from .peers import (  # noqa: E402
    Family,
    differences,
    logits_difference,
    some_ids,
    tutorial,
    tutorial_params,
    weights,
)

pytestmark = pytest.mark.parity

VOCABULARY = 101  # padded to 128
PRESET = lm.preset("torch_tutorial").resolve(VOCABULARY).model
SMALL = dataclasses.replace(PRESET, num_layers=3, d_model=24, num_heads=6, d_ff=40)
TUTORIAL = Family(tutorial, tutorial_params, SMALL, table_std=0.1)

# Both compute in float32 and add in another order. Relative to the largest entry of the array.
TOLERANCE = 1e-5
CLEARLY = 1000 * TOLERANCE


@pytest.mark.parametrize(
    ("cfg", "length"),
    [(PRESET, 35), (SMALL, 1), (SMALL, 17), (dataclasses.replace(SMALL, num_layers=1, num_heads=1), 301)],
    ids=["preset", "one-token", "six-heads-odd", "long"],
)
def test_logits_and_gradients_equal(cfg, length):
    found = differences(TUTORIAL, TUTORIAL.model(cfg), cfg, some_ids(cfg, 3, length + 1))
    assert len(found) == 2 + 1 + 12 + 2  # logits and loss; embedding; a layer's; head
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize(
    "change",
    [
        {"activation": "gelu"},
        {"embedding_scale": False},
        {"positions": "none"},
        {"positions": "rotary"},
        {"norm": "rmsnorm"},
        {"norm_position": "pre"},
    ],
    ids=str,
)
def test_logits_differ_with_another_config(change):
    cfg = TUTORIAL.config
    model = TUTORIAL.model(cfg)
    params = tutorial_params(weights(model), cfg)
    params["norm"] = {"scale": np.ones(cfg.d_model, np.float32), "bias": np.zeros(cfg.d_model, np.float32)}
    ours = dataclasses.replace(cfg, **change)
    assert logits_difference(TUTORIAL, model, cfg, some_ids(cfg, 3, 17), ours=ours, params=params) > CLEARLY


@pytest.mark.parametrize("part", ["head bias", "linear biases", "attention biases", "norm biases", "untied head"])
def test_logits_differ_with_a_part_left_out(part):
    cfg = TUTORIAL.config
    model = TUTORIAL.model(cfg)
    params = tutorial_params(weights(model), cfg)
    layers = params["layers"]
    doomed = {
        "head bias": [(params["head"], "bias")],
        "linear biases": [(layers["feed_forward"], "up_bias"), (layers["feed_forward"], "down_bias")],
        "attention biases": [(layers["attention"], "qkv_bias"), (layers["attention"], "out_bias")],
        "norm biases": [(layers["attention_norm"], "bias"), (layers["feed_forward_norm"], "bias")],
        "untied head": [(params["head"], "kernel")],
    }[part]
    for tree, name in doomed:
        del tree[name]
    assert logits_difference(TUTORIAL, model, cfg, some_ids(cfg, 3, 17), params=params) > CLEARLY


def test_logits_differ_without_the_causal_mask():
    model = TUTORIAL.model(SMALL)
    assert logits_difference(TUTORIAL, model, SMALL, some_ids(SMALL, 3, 17), causal=False) > CLEARLY


def test_epsilon_is_torchs():
    """With residual sums this small a norm's variance is near its epsilon."""
    model = TUTORIAL.model(SMALL)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm1" in name or "linear2" in name:
                weight *= 0.01
    tokens_BT = some_ids(SMALL, 3, 17)
    assert logits_difference(TUTORIAL, model, SMALL, tokens_BT) < TOLERANCE
    for epsilon in (1e-6, 1e-8):
        ours = dataclasses.replace(SMALL, norm_epsilon=epsilon)
        assert logits_difference(TUTORIAL, model, SMALL, tokens_BT, ours=ours) > CLEARLY


def test_fresh_weights_have_torchs_distributions():
    cfg = dataclasses.replace(PRESET, num_layers=4, d_model=128, num_heads=4, d_ff=320)
    torch.manual_seed(0)
    model = tutorial(cfg)
    for i in range(cfg.num_layers):  # TransformerEncoder copies its first layer; ours are drawn one by one
        model.transformer_encoder.layers[i] = torch.nn.TransformerEncoderLayer(cfg.d_model, cfg.num_heads, cfg.ff_width)
    theirs = without_padding(tutorial_params(weights(model), cfg))
    ours = without_padding(declare.initialize(model_specs(cfg), jax.random.key(0)))
    names = []
    pairs = jax.tree_util.tree_map_with_path(
        lambda path, a, b: (jax.tree_util.keystr(path), np.asarray(a), b), ours, theirs
    )
    for name, a, b in jax.tree.leaves(pairs, is_leaf=lambda node: isinstance(node, tuple)):
        assert a.shape == b.shape, name
        if np.ptp(b) == 0:
            assert np.array_equal(a, b), name  # zero biases, unit scales
            continue
        names.append(name)
        # The largest of n uniform draws falls short of the bound by 1/n of it: 512 or more draws.
        assert np.abs(a).max() == pytest.approx(np.abs(b).max(), rel=0.02), name
        assert stats.ks_2samp(a.ravel(), b.ravel()).pvalue > 1e-3, name
        if "layers" in name:
            assert not np.array_equal(a[0], a[1]), name
    assert len(names) == 2 + 4 + 2  # tables; qkv, out, up, down; up_bias, down_bias

    qkv = model_specs(dataclasses.replace(cfg, initializer="normal"))["layers"]["attention"]["qkv"]
    normal = np.ravel(qkv.init(jax.random.key(0), qkv.shape))
    assert stats.ks_2samp(normal, theirs["layers"]["attention"]["qkv"].ravel()).pvalue < 1e-6


@pytest.mark.parametrize("names", [("encoder", "transformer_encoder", "decoder"), ("embedding", "encoder", "linear")])
def test_states_are_opened_and_written(names, tmp_path):
    """Under the names of both versions of the tutorial; what we write torch takes strictly, in the same bits."""
    from safetensors.torch import load_file, save_file

    model = TUTORIAL.model(SMALL)
    renamed = dict(zip(("encoder", "transformer_encoder", "decoder"), names, strict=True))
    state = {".".join([renamed.get(part, part) if i == 0 else part for i, part in enumerate(name.split("."))]): tensor
             for name, tensor in model.state_dict().items()}  # fmt: skip
    save_file(state, tmp_path / "theirs.safetensors")
    cfg, params = torch_transformer.load_state_dict(tmp_path / "theirs.safetensors", SMALL.num_heads)
    assert arithmetic(cfg) == {**arithmetic(SMALL), "max_positions": None}
    tokens_BT = some_ids(SMALL, 3, 17)
    assert logits_difference(TUTORIAL, model, cfg, tokens_BT, params=params) < TOLERANCE
    for heads in (2, 3):
        other, split = torch_transformer.load_state_dict(tmp_path / "theirs.safetensors", heads)
        assert logits_difference(TUTORIAL, model, cfg, tokens_BT, ours=other, params=split) > CLEARLY

    ours = without_padding(tutorial_params(weights(model), SMALL))
    padded = tutorial_params(weights(model), SMALL)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, params), ours)
    torch_transformer.save_state_dict(tmp_path / "ours.safetensors", SMALL, padded, positions=512)
    back = tutorial(SMALL)
    back.load_state_dict(load_file(tmp_path / "ours.safetensors"), strict=True)
    for name, weight in weights(back).items():
        assert np.array_equal(weight, weights(model)[name]), name


def without_padding(params):
    embed, head = params["embed"], params["head"]
    return {
        "embed": {"tokens": embed["tokens"][:VOCABULARY]},
        "layers": params["layers"],
        "head": {"kernel": head["kernel"][:, :VOCABULARY], "bias": head["bias"][:VOCABULARY]},
    }
