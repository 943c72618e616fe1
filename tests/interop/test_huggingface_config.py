"""config.json <-> ModelConfig: what is read, what is refused by name and value, which family a model is written as."""

from __future__ import annotations

import dataclasses
import warnings

import pytest

import lm
from lm.config import InputError, ModelConfig
from lm.interop.huggingface_config import FAMILIES, arithmetic, read, write
from lm.interop.huggingface_weights import weights
from lm.nn import params as declare
from lm.nn.language_model import model_specs
from tests.conftest import SHAPES, resolved

LLAMA = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 4}
GEMMA3 = {**LLAMA, "model_type": "gemma3_text"}


def model(**fields) -> ModelConfig:
    return read({**LLAMA, **fields}, "config.json")[1]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_defaults_of_a_family_go_there_and_back(model_type):
    """As many parameters are named as the model has, each once."""
    family, cfg = read({"model_type": model_type}, "config.json")
    again, fields = write(cfg, model_type)
    assert again is family
    assert arithmetic(read(fields, "config.json")[1]) == arithmetic(cfg)
    small = dataclasses.replace(cfg, num_layers=2)
    named = list(weights(small, model_type))
    sizes = sum(declare.count({"x": declare.ParamSpec(weight.shape, (), declare.zeros)}) for weight in named)
    assert sizes == declare.count(model_specs(small))
    assert len({weight.name for weight in named}) == len(named)


def test_both_versions_of_transformers():
    old = model(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0}, torch_dtype="bfloat16")
    new = model(rope_parameters={"rope_theta": 5e5, "rope_type": "linear", "factor": 2}, dtype="bfloat16")
    assert old == new
    assert (old.rotary_base, old.rotary_factor, old.rotary_scaling) == (5e5, 2.0, "linear")


def test_layer_types():
    """Gemma 3 by its pattern, by layer_types, and with rope_parameters for each type."""
    by_pattern = read({**GEMMA3, "sliding_window_pattern": 2, "sliding_window": 8}, "")[1]
    types = ["sliding_attention", "full_attention"] * 2
    assert read({**GEMMA3, "layer_types": types, "sliding_window": 8}, "")[1] == by_pattern
    entries = {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}, "sliding_attention": {"rope_theta": 1e4}}
    new = {**GEMMA3, "layer_types": types, "sliding_window": 8, "rope_parameters": entries}
    assert read(new, "")[1] == by_pattern
    assert by_pattern.window == (8, None)
    assert by_pattern.rotary_base == (1e4, 1e6)
    image = {"model_type": "gemma3", "text_config": GEMMA3, "vision_config": {"x": 1}, "image_token_index": 7}
    assert arithmetic(read(image, "")[1]) == arithmetic(read(GEMMA3, "")[1])


REFUSED = {
    "no model_type": ({"model_type": None}, "model_type None is not known"),
    "near miss": ({"model_type": "qwen_3"}, "did you mean 'qwen3'"),
    "unknown": ({"model_type": "mamba"}, "known are gpt2, llama, mistral, qwen2, qwen3, gemma2, gemma3_text"),
    "wrong type": ({"hidden_size": "16"}, "hidden_size is '16', it must be of type int"),
    "null": ({"hidden_size": None}, "has no hidden_size"),
    "activation": ({"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu'"),
    "o_proj bias": ({"attention_bias": True}, "attention_bias True with mlp_bias False"),
    "mlp bias": ({"model_type": "qwen3", "mlp_bias": True}, "mlp_bias True"),
    "qwen3 bias": ({"model_type": "qwen3", "attention_bias": True}, "attention_bias True"),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling 'yarn' is not implemented"),
    "yarn of 5": ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    "llama3 without": ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "has no low_freq_factor"),
    "linear with more": (
        {"rope_scaling": {"type": "linear", "factor": 2.0, "attention_factor": 3.0}},
        "attention_factor 3",
    ),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "partial of 5": (
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor 0.5",
    ),
    "flat gemma3": ({"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 1e4}}, "rope_parameters"),
    "cap of gemma3": ({"model_type": "gemma3_text", "attn_logit_softcapping": 2.0}, "attn_logit_softcapping 2.0"),
    "bidirectional": (
        {"model_type": "gemma2", "use_bidirectional_attention": True},
        "use_bidirectional_attention True",
    ),
    "layers": ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    "cross": ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention True"),
    "window": ({"sliding_window": 8}, "sliding_window 8"),
    "layer types": ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
    "too few types": ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "each of the 4 layers"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_change_the_result_is_refused(fields, message):
    with pytest.raises(InputError) as raised:
        model(**fields)
    assert message in str(raised.value)


def test_harmless_fields_pass_and_unknown_ones_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(use_cache=True, attention_dropout=0.1, transformers_version="5.0", pretraining_tp=2, mystery=False)
    with pytest.warns(UserWarning, match="mystery = 3, riddle = 'x'"):
        model(mystery=3, riddle="x", use_cache=True)


WRITTEN = {"gpt2": "gpt2", "llama": "llama", "modern": None, "tutorial": None, "bare": None}


@pytest.mark.parametrize(("shape", "family"), WRITTEN.items())
def test_the_family_of_a_model(shape, family):
    cfg = resolved(SHAPES[shape])
    if family is not None:
        assert write(cfg)[0].model_type == family
        return
    with pytest.raises(InputError) as raised:
        write(cfg)
    fields = {
        "modern": ["model.activation 'relu2'"],
        "tutorial": ["model.norm_position 'post'", "model.head_bias True"],
    }
    assert all(field in str(raised.value) for field in fields.get(shape, ["model.positions 'none'"]))


@pytest.mark.parametrize(("preset", "family"), [("gpt2_124m", "gpt2"), ("llama_1b", "llama")])
def test_presets_that_are_a_familys(preset, family):
    config = lm.preset(preset)
    cfg = config.resolve(config.tokenizer.vocab_size).model
    assert write(cfg)[0].model_type == family


@pytest.mark.parametrize(
    ("change", "family"),
    [
        ({"window": 8}, "mistral"),
        (
            {"d_model": 30, "head_dim": 8},
            "mistral",
        ),  # transformers 5 refuses a Llama whose heads don't divide its width
        ({"qkv_bias": True}, "qwen2"),
        ({"qkv_bias": True, "window": (None, 8)}, "qwen2"),
        ({"qk_norm": True}, "qwen3"),
        ({"qk_norm": True, "qkv_bias": True}, None),
        ({"qk_norm": True, "norm_position": "post"}, None),
        ({"rotary_factor": 4.0, "rotary_scaling": "llama3"}, "llama"),
        ({"rotary_base": (1e4, 1e6)}, None),
        ({"attention_scale": 0.1}, None),
        ({"attention_scale": 8**-0.5}, "llama"),  # what it is anyway
        ({"dropout": 0.1, "scan_layers": True, "remat": True, "compute_dtype": "bfloat16"}, "llama"),
    ],
    ids=str,
)
def test_a_llama_with_a_change(change, family):
    cfg = dataclasses.replace(resolved(SHAPES["llama"]), **change)
    if family is not None:
        found, fields = write(cfg)
        assert found.model_type == family
        assert arithmetic(read(fields, "")[1]) == arithmetic(cfg)
        return
    with pytest.raises(InputError) as raised:
        write(cfg)
    assert any(f"model.{name}" in str(raised.value) for name in change)


def test_gemma_without_windows_and_its_caps():
    gemma = {
        **{"activation": "geglu", "norm_position": "both", "norm_offset": True, "embedding_scale": True},
        **{"tie_embeddings": True, "rotary_factor": 1.0, "rotary_scaling": "linear"},
    }
    cfg = dataclasses.replace(resolved(SHAPES["llama"]), **gemma)
    for qk_norm, family in ((False, "gemma2"), (True, "gemma3_text")):
        found, fields = write(dataclasses.replace(cfg, qk_norm=qk_norm))
        assert found.model_type == family
        assert fields["sliding_window"] == 4096 and set(fields["layer_types"]) == {"full_attention"}
    capped = dataclasses.replace(cfg, attention_softcap=1.0)
    assert write(capped)[1]["attn_logit_softcapping"] == 1.0
    with pytest.raises(InputError, match="gemma3_text doesn't have this model: it differs in model.attention_softcap"):
        write(dataclasses.replace(capped, qk_norm=True), "gemma3_text")


def test_a_family_by_name():
    cfg = resolved(SHAPES["llama"])
    assert write(cfg, "mistral")[0].model_type == "mistral"
    with pytest.raises(InputError, match="gpt2 doesn't have this model: .*model.norm 'rmsnorm' \\(not 'layernorm'\\)"):
        write(cfg, "gpt2")
    with pytest.raises(InputError, match="did you mean 'llama'"):
        write(cfg, "lama")


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 10**9},
        {"rope_theta": 10**400},
        {"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}},
        {"rope_parameters": {"full_attention": 5}},
        {"model_type": "gemma2", "query_pre_attn_scalar": 0},
        {"model_type": "gemma3_text", "sliding_window_pattern": 0},
        {"model_type": "qwen2", "layer_types": [["full_attention"]]},
    ],
    ids=str,
)
def test_values_that_no_model_has_are_refused(fields):
    with pytest.raises(InputError, match=r"config\.json"):
        read({"model_type": "llama", **fields}, "config.json")
