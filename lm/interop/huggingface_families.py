"""The families of models that Hugging Face and lm can both express, and what their config.json says by which field.

A field that is absent has the default that transformers gives it in that family.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from lm.config import ModelConfig
from lm.interop import huggingface_t5 as t5
from lm.interop.huggingface_fields import PLAIN, Fields, called
from lm.interop.huggingface_rotary import FULL, SLIDING, pattern, read_rotary, write_rotary

_GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}


class Family(NamedTuple):
    """An architecture of transformers.

    `defaults` are of the fields that a config.json may leave out. `write` says of a ModelConfig what the family can
    say; where `read` makes another model of that, the family can't express it. `divided`: transformers 5 wants the
    heads to divide the width, whatever their own width.
    """

    model_type: str
    architecture: str
    defaults: dict[str, Any]
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    harmless: tuple[str, ...] = ()
    divided: bool = True


def _gpt2(f: Fields) -> ModelConfig:
    width, heads = f.get("n_embd", int), f.get("n_head", int)
    return ModelConfig(
        num_layers=f.get("n_layer", int),
        d_model=width,
        num_heads=heads,
        d_ff=f.maybe("n_inner", int),
        norm_epsilon=f.get("layer_norm_epsilon", float),
        activation=f.choice("activation_function", PLAIN),  # type: ignore[arg-type]
        max_positions=f.get("n_positions", int),
        tie_embeddings=f.get("tie_word_embeddings", bool),
        bias=True,
        attention_scale=None if f.get("scale_attn_weights", bool) else 1.0,
        vocab_size=f.get("vocab_size", int),
        vocab_multiple=1,
    )


def _to_gpt2(cfg: ModelConfig) -> dict[str, Any]:
    return {
        "n_layer": cfg.num_layers,
        "n_embd": cfg.d_model,
        "n_head": cfg.num_heads,
        "n_inner": cfg.ff_width,
        "layer_norm_epsilon": cfg.norm_epsilon,
        "activation_function": called(cfg, PLAIN),
        "n_positions": cfg.position_rows,
        "tie_word_embeddings": cfg.tie_embeddings,
        "scale_attn_weights": cfg.attention_scale != 1.0,
        "vocab_size": cfg.vocabulary,
        **{f"{place}_pdrop": cfg.dropout for place in ("resid", "embd", "attn")},
    }


def _llama(
    f: Fields,
    *,
    windows: list[int | None] | None = None,
    activation: str = "hidden_act",
    by_layer_type: bool = False,
) -> ModelConfig:
    """What Llama and all that came after it share. `windows`: of every layer."""
    layers = f.get("num_hidden_layers", int)
    windows = windows or [None] * layers
    return ModelConfig(
        num_layers=layers,
        d_model=f.get("hidden_size", int),
        num_heads=f.get("num_attention_heads", int),
        num_kv_heads=f.maybe("num_key_value_heads", int),
        head_dim=f.maybe("head_dim", int),
        d_ff=f.get("intermediate_size", int),
        norm="rmsnorm",
        norm_epsilon=f.get("rms_norm_eps", float),
        activation=f.choice(activation, _GATED),  # type: ignore[arg-type]
        positions="rotary",
        max_positions=f.get("max_position_embeddings", int),
        tie_embeddings=f.get("tie_word_embeddings", bool),
        window=pattern(windows),
        vocab_size=f.get("vocab_size", int),
        vocab_multiple=1,
        **read_rotary(f, windows, by_layer_type=by_layer_type),
    )


def _to_llama(cfg: ModelConfig, *, activation: str = "hidden_act", by_layer_type: bool = False) -> dict[str, Any]:
    return {
        "num_hidden_layers": cfg.num_layers,
        "hidden_size": cfg.d_model,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_width,
        "intermediate_size": cfg.ff_width,
        "rms_norm_eps": cfg.norm_epsilon,
        activation: called(cfg, _GATED),
        "max_position_embeddings": cfg.position_rows,
        "tie_word_embeddings": cfg.tie_embeddings,
        "vocab_size": cfg.vocabulary,
        "attention_dropout": cfg.dropout,
        **write_rotary(cfg, by_layer_type=by_layer_type),
    }


def _llama_with_biases(f: Fields) -> ModelConfig:
    attention, feed_forward = f.get("attention_bias", bool), f.get("mlp_bias", bool)
    if attention != feed_forward:
        raise f.refuse("attention_bias", attention, f"with mlp_bias {feed_forward} is not implemented: both or none")
    return dataclasses.replace(_llama(f), bias=attention)


def _mistral(f: Fields) -> ModelConfig:
    return _llama(f, windows=[f.maybe("sliding_window", int)] * f.get("num_hidden_layers", int))


def _qwen(f: Fields) -> ModelConfig:
    """Layers from max_window_layers on have a window, unless layer_types says which."""
    layers, first = f.get("num_hidden_layers", int), f.get("max_window_layers", int)
    window, used = f.maybe("sliding_window", int), f.get("use_sliding_window", bool)
    types = [SLIDING if i >= first else FULL for i in range(layers)]
    return _llama(f, windows=_windows(f, window if used else None, types))


def _gemma(f: Fields, *, period: int, by_layer_type: bool) -> ModelConfig:
    """Every `period`-th layer sees all, the others a window, unless layer_types says which."""
    layers, scalar = f.get("num_hidden_layers", int), f.get("query_pre_attn_scalar", float)
    types = [SLIDING if (i + 1) % period else FULL for i in range(layers)]
    windows = _windows(f, f.maybe("sliding_window", int), types)
    cfg = _llama(f, windows=windows, activation="hidden_activation", by_layer_type=by_layer_type)
    return dataclasses.replace(
        cfg,
        norm_position="both",
        norm_offset=True,
        embedding_scale=True,
        attention_scale=None if scalar == cfg.head_width else scalar**-0.5,
        attention_softcap=f.maybe("attn_logit_softcapping", float),
        logit_softcap=f.maybe("final_logit_softcapping", float),
    )


def _gemma3(f: Fields) -> ModelConfig:
    if (cap := f.maybe("attn_logit_softcapping", float)) is not None:
        raise f.refuse(
            "attn_logit_softcapping", cap, "is in no model of this architecture, and transformers ignores it"
        )
    cfg = _gemma(f, period=f.get("sliding_window_pattern", int), by_layer_type=True)
    return dataclasses.replace(cfg, qk_norm=True)


def _to_llama_with_biases(cfg: ModelConfig) -> dict[str, Any]:
    return {**_to_llama(cfg), "attention_bias": cfg.bias, "mlp_bias": cfg.bias}


def _to_mistral(cfg: ModelConfig) -> dict[str, Any]:
    return {**_to_llama(cfg), "sliding_window": cfg.layer_pattern[0].window}


def _to_qwen(cfg: ModelConfig) -> dict[str, Any]:
    types = _layer_types(cfg)
    first = types["layer_types"].index(SLIDING) if SLIDING in types["layer_types"] else cfg.num_layers
    used = {"use_sliding_window": SLIDING in types["layer_types"], "max_window_layers": first}
    return {**_to_llama(cfg), **types, **used}


def _to_gemma(cfg: ModelConfig, *, by_layer_type: bool, capped: bool) -> dict[str, Any]:
    """`capped`: whether the family has caps on attention's scores; without, the comparison finds out."""
    types = _layer_types(cfg)
    if types["sliding_window"] is None:  # transformers wants a number even where no layer has a window
        types["sliding_window"] = _GEMMA2["sliding_window"]
    return {
        **_to_llama(cfg, activation="hidden_activation", by_layer_type=by_layer_type),
        **types,
        "query_pre_attn_scalar": round(cfg.score_scale**-2),
        "attn_logit_softcapping": cfg.attention_softcap if capped else None,
        "final_logit_softcapping": cfg.logit_softcap,
    }


def _windows(f: Fields, window: int | None, otherwise: list[str]) -> list[int | None]:
    types = f.maybe("layer_types", list) or otherwise
    if len(types) != len(otherwise) or not set(types) <= {FULL, SLIDING}:
        raise f.refuse("layer_types", types, f"must name {FULL} or {SLIDING} for each of the {len(otherwise)} layers")
    return [window if kind == SLIDING else None for kind in types]


def _layer_types(cfg: ModelConfig) -> dict[str, Any]:
    windows = [cfg.layer_pattern[i % len(cfg.layer_pattern)].window for i in range(cfg.num_layers)]
    return {
        "layer_types": [FULL if window is None else SLIDING for window in windows],
        "sliding_window": next((window for window in windows if window is not None), None),
    }


_SHARED = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": False}
_GPT2 = {
    **{"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12},
    **{"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True},
    "tie_word_embeddings": True,
}
_LLAMA = {
    **_SHARED,
    **{"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
}
_MISTRAL = {
    **_SHARED,
    **{"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
}
_QWEN2 = {
    **_SHARED,
    **{"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32768},
    **{"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
}
_GEMMA2 = {
    **_SHARED,
    **{"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192},
    **{"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "query_pre_attn_scalar": 256},
    **{"sliding_window": 4096, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
}
_GEMMA3 = {
    **_GEMMA2,
    **{"vocab_size": 262208, "max_position_embeddings": 131072, "rope_theta": 1e6, "rope_local_base_freq": 10_000.0},
    **{"final_logit_softcapping": None, "attn_logit_softcapping": None, "sliding_window_pattern": 6},
}
FAMILIES = {
    family.model_type: family
    for family in (
        Family("gpt2", "GPT2LMHeadModel", _GPT2, _gpt2, _to_gpt2),
        Family("llama", "LlamaForCausalLM", _LLAMA, _llama_with_biases, _to_llama_with_biases),
        Family("mistral", "MistralForCausalLM", _MISTRAL, _mistral, _to_mistral, divided=False),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            _QWEN2,
            lambda f: dataclasses.replace(_qwen(f), qkv_bias=True),
            _to_qwen,
            divided=False,
            harmless=("attention_bias",),  # it has them on queries, keys and values whatever this says
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            {**_QWEN2, "head_dim": 128},
            lambda f: dataclasses.replace(_qwen(f), qk_norm=True),
            _to_qwen,
            divided=False,
        ),
        Family(
            "gemma2",
            "Gemma2ForCausalLM",
            _GEMMA2,
            lambda f: _gemma(f, period=2, by_layer_type=False),
            lambda cfg: _to_gemma(cfg, by_layer_type=False, capped=True),
            harmless=("hidden_act",),
        ),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            _GEMMA3,
            _gemma3,
            lambda cfg: _to_gemma(cfg, by_layer_type=True, capped=False),
            harmless=("hidden_act", "_sliding_window_pattern"),
        ),
        Family(
            "t5",
            "T5ForConditionalGeneration",
            t5.T5,
            lambda f: t5.read(f, scaled=True),
            lambda cfg: t5.write(cfg, scaled=True),
            harmless=t5.HARMLESS,
            divided=False,
        ),
        Family(
            "mt5",
            "MT5ForConditionalGeneration",
            t5.MT5,
            lambda f: t5.read(f, scaled=False),
            lambda cfg: t5.write(cfg, scaled=False),
            harmless=(*t5.HARMLESS, "scale_decoder_outputs"),
            divided=False,
        ),
    )
}
"""By model_type, in the order in which a model that fits several is called."""
