"""Our decoder-only models are GPT-2, Llama and Qwen3 as transformers has them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from .peers import GPT2, LLAMA, QWEN3, differences, logits_difference, resolved, some_ids, weights  # noqa: E402

pytestmark = pytest.mark.parity

VOCABULARY, POSITIONS = 101, 40  # the vocabulary is padded to 128

# Both compute in float32 and add in another order. Relative to the largest entry of the array.
TOLERANCE = 1e-5
CLEARLY = 1000 * TOLERANCE


def model_of(family, **change):
    cfg = resolved(dataclasses.replace(family.config, **change), VOCABULARY, POSITIONS)
    return family.model(cfg), cfg


EQUAL = {
    "gpt2": (GPT2, {}),
    "gpt2-one-head": (GPT2, {"num_heads": 1, "num_layers": 1, "d_ff": 72, "norm_epsilon": 1e-6}),
    "llama": (LLAMA, {}),
    "llama-tied": (LLAMA, {"tie_embeddings": True, "rotary_base": 500_000.0}),
    "llama-one-kv-head": (LLAMA, {"num_kv_heads": 1, "norm_epsilon": 1e-6}),
    "llama-wide-heads": (LLAMA, {"num_kv_heads": None, "head_dim": 10, "num_layers": 1}),
    "llama-biases": (LLAMA, {"bias": True, "num_layers": 1}),
    "qwen3": (QWEN3, {}),
    "qwen3-tied": (QWEN3, {"tie_embeddings": True, "num_layers": 1}),
}


@pytest.mark.parametrize(("family", "change"), EQUAL.values(), ids=EQUAL)
def test_logits_and_gradients_equal(family, change):
    model, cfg = model_of(family, **change)
    found = differences(family, model, cfg, some_ids(cfg, 3, 38))
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
def test_rotary_over_long_distances(base):
    """150 tokens spread over 8000 positions. An ulp of 8000 is 5e-4 radians, so the angles must be rounded alike."""
    model, cfg = model_of(LLAMA, rotary_base=base)
    tokens_BT = some_ids(cfg, 2, 150)
    positions_BT = np.broadcast_to(53 * np.arange(150, dtype=np.int32), tokens_BT.shape)
    theirs = {"position_ids": torch.tensor(positions_BT), "attention_mask": torch.ones(tokens_BT.shape)}
    assert logits_difference(LLAMA, model, cfg, tokens_BT, positions_BT, **theirs) < TOLERANCE
    assert logits_difference(LLAMA, model, cfg, tokens_BT, **theirs) > CLEARLY  # positions 0 to 149


DIFFERENT = {
    # The two forms of GELU are within 5e-4 of each other everywhere.
    "gpt2-exact-gelu": (GPT2, {"activation": "gelu"}, 10 * TOLERANCE),
    "gpt2-relu": (GPT2, {"activation": "relu"}, CLEARLY),
    "gpt2-post-norm": (GPT2, {"norm_position": "post"}, CLEARLY),
    "gpt2-rmsnorm": (GPT2, {"norm": "rmsnorm"}, CLEARLY),
    "gpt2-epsilon": (GPT2, {"norm_epsilon": 1e-6}, CLEARLY),
    "gpt2-embedding-scale": (GPT2, {"embedding_scale": True}, CLEARLY),
    "llama-no-positions": (LLAMA, {"positions": "none"}, CLEARLY),
    "llama-base": (LLAMA, {"rotary_base": 20_000.0}, CLEARLY),
    "llama-layernorm": (LLAMA, {"norm": "layernorm"}, CLEARLY),
    "llama-epsilon": (LLAMA, {"norm_epsilon": 1e-6}, CLEARLY),
    "llama-no-gate": (LLAMA, {"activation": "gelu"}, CLEARLY),
    "llama-softcap": (LLAMA, {"logit_softcap": 5.0}, CLEARLY),
    "qwen3-base": (QWEN3, {"rotary_base": 10_000.0}, CLEARLY),
}


@pytest.mark.parametrize(("family", "change", "margin"), DIFFERENT.values(), ids=DIFFERENT)
def test_logits_differ_with_another_config(family, change, margin):
    model, cfg = model_of(family)
    ours = dataclasses.replace(cfg, **change)
    assert logits_difference(family, model, cfg, some_ids(cfg, 3, 37), ours=ours) > margin


def test_logits_differ_with_queries_at_the_wrong_key_head():
    model, cfg = model_of(LLAMA)
    params = LLAMA.params(weights(model), cfg)
    qkv = params["layers"]["attention"]["qkv"]
    queries = slice(0, cfg.num_heads // cfg.kv_heads * cfg.head_width)
    qkv[..., queries] = qkv[:, :, ::-1, queries].copy()
    out = params["layers"]["attention"]["out"]
    params["layers"]["attention"]["out"] = np.roll(out, cfg.num_heads // 2, axis=1)  # values find their outputs again
    assert logits_difference(LLAMA, model, cfg, some_ids(cfg, 3, 37), params=params) > CLEARLY


def test_logits_differ_without_the_norms_on_queries_and_keys():
    model, cfg = model_of(QWEN3)
    params = QWEN3.params(weights(model), cfg)
    del params["layers"]["attention"]["q_norm"], params["layers"]["attention"]["k_norm"]
    assert logits_difference(QWEN3, model, cfg, some_ids(cfg, 3, 37), params=params) > CLEARLY


def test_logits_differ_with_a_tied_head():
    model, cfg = model_of(LLAMA)
    params = LLAMA.params(weights(model), cfg)
    del params["head"]
    assert logits_difference(LLAMA, model, cfg, some_ids(cfg, 3, 37), params=params) > CLEARLY


def test_logits_differ_with_neighbours_turned_in_place_of_halves():
    """The other convention for rotary pairs, (0, 1), (2, 3), ..., by permuting each head."""
    model, cfg = model_of(LLAMA)
    params = LLAMA.params(weights(model), cfg)
    H, heads = cfg.head_width, cfg.num_heads // cfg.kv_heads + 1  # of queries and of the key
    halves = np.concatenate([np.arange(0, H, 2), np.arange(1, H, 2)])
    order = np.concatenate([*(head * H + halves for head in range(heads)), heads * H + np.arange(H)])
    params["layers"]["attention"]["qkv"] = params["layers"]["attention"]["qkv"][..., order]
    assert logits_difference(LLAMA, model, cfg, some_ids(cfg, 3, 37), params=params) > CLEARLY
