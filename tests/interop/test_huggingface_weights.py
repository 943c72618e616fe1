"""What tensors are called, whatever model they are in; buffers and image towers are none of ours."""

from __future__ import annotations

import pytest

from lm.interop.huggingface_weights import HEAD, canonical, prefixed


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("transformer.h.0.attn.c_attn.bias", "h.0.attn.c_attn.bias"),
        ("h.11.ln_1.weight", "h.11.ln_1.weight"),
        ("model.layers.3.mlp.up_proj.weight", "layers.3.mlp.up_proj.weight"),
        ("layers.3.mlp.up_proj.weight", "layers.3.mlp.up_proj.weight"),
        ("language_model.model.embed_tokens.weight", "embed_tokens.weight"),  # Gemma 3 with images, transformers 4
        ("model.language_model.norm.weight", "norm.weight"),  # the same, transformers 5
        ("language_model.lm_head.weight", HEAD),
        ("lm_head.weight", HEAD),
        ("transformer.h.0.attn.bias", None),
        ("h.0.attn.masked_bias", None),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", None),
        ("model.vision_tower.encoder.layers.0.mlp.fc1.bias", None),
        ("multi_modal_projector.mm_input_projection_weight", None),
    ],
)
def test_names(name, expected):
    assert canonical(name) == expected


@pytest.mark.parametrize(("model_type", "first"), [("gpt2", "transformer."), ("qwen3", "model.")])
def test_names_as_they_are_written(model_type, first):
    assert prefixed("x.weight", model_type) == f"{first}x.weight"
    assert canonical(prefixed("x.weight", model_type)) == "x.weight"
    assert prefixed(HEAD, model_type) == HEAD
