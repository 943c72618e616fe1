"""Small models of every family that lm opens, described by config.json as transformers 4 wrote it, and what of each
must matter: changes of our config after which the logits are others."""

from __future__ import annotations

from typing import Any, NamedTuple

SHAPE = {
    **{"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 48, "rms_norm_eps": 1e-5, "hidden_act": "silu"},
    **{"bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32", "tie_word_embeddings": False},
}
GEMMA = {**SHAPE, "hidden_activation": "gelu_pytorch_tanh", "head_dim": 12, "sliding_window": 4}
del GEMMA["tie_word_embeddings"]  # true, unless it says otherwise
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


class Family(NamedTuple):
    """`changes` are of ModelConfig, `parts` of parameters to leave out, by path."""

    config: dict[str, Any]
    changes: tuple[dict[str, Any], ...]
    parts: tuple[str, ...] = ()


Q_NORMS = "layers/attention/q_norm layers/attention/k_norm"
EPSILON = {"norm_epsilon": 1e-3}
FAMILIES = {
    "gpt2": Family(
        {
            **{"model_type": "gpt2", "vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 48},
            **{"n_ctx": 48, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "torch_dtype": "float32"},
            **{"n_inner": 48, "bos_token_id": 1, "eos_token_id": 2},
        },
        (EPSILON, {"activation": "relu"}, {"attention_scale": 1.0}, {"norm": "rmsnorm"}),
        ("embed/positions", "layers/attention/qkv_bias"),
    ),
    "gpt2-unscaled-untied": Family(
        {
            **{"model_type": "gpt2", "vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48},
            **{"scale_attn_weights": False, "tie_word_embeddings": False, "activation_function": "relu"},
            **{"bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32"},
        },
        ({"attention_scale": None}, {"activation": "gelu_tanh"}),
        ("head",),
    ),
    "llama": Family(
        {**SHAPE, "model_type": "llama", "rope_theta": 10_000.0},
        (EPSILON, {"rotary_base": 20_000.0}, {"activation": "geglu"}, {"positions": "none"}, {"window": 4}),
        ("head",),
    ),
    "llama-biases": Family(
        {**SHAPE, "model_type": "llama", "attention_bias": True, "mlp_bias": True, "num_key_value_heads": None},
        (),
        ("layers/attention/qkv_bias", "layers/attention/out_bias", "layers/feed_forward/up_bias"),
    ),
    "llama3": Family(
        {
            **{**SHAPE, "model_type": "llama", "rope_theta": 500.0, "tie_word_embeddings": True},
            "rope_scaling": {"rope_type": "llama3", **LLAMA3},
        },
        (
            *({"rotary_base": 1000.0}, {"rotary_factor": 1.0}, {"rotary_factor": 4.0}, {"rotary_scaling": "linear"}),
            *({"rotary_low_frequency_factor": 2.0}, {"rotary_high_frequency_factor": 8.0}),
            {"rotary_original_positions": 32},
        ),
    ),
    "llama-linear": Family(
        {**SHAPE, "model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}, "pretraining_tp": 1},
        ({"rotary_factor": 1.0}, {"rotary_factor": 2.0}),
    ),
    "mistral": Family(
        {**SHAPE, "model_type": "mistral", "sliding_window": 5, "head_dim": 12, "rope_theta": 10_000.0},
        (EPSILON, {"window": None}, {"window": 6}, {"window": 4}, {"rotary_base": 20_000.0}),
        ("head",),
    ),
    "qwen2": Family(
        {
            **{**SHAPE, "model_type": "qwen2", "rope_theta": 1_000_000.0, "use_sliding_window": True},
            **{"sliding_window": 5, "max_window_layers": 1, "tie_word_embeddings": True},
        },
        (EPSILON, {"window": None}, {"window": 5}, {"window": (5, None, 5)}, {"rotary_base": 10_000.0}),
        ("layers/attention/qkv_bias",),
    ),
    "qwen2-no-window": Family(
        {**SHAPE, "model_type": "qwen2", "use_sliding_window": False, "sliding_window": 5, "max_window_layers": 1},
        ({"window": 5},),
        ("head",),
    ),
    "qwen3": Family(
        {**SHAPE, "model_type": "qwen3", "head_dim": 12, "rope_theta": 1_000_000.0, "sliding_window": None},
        (EPSILON, {"rotary_base": 10_000.0}),
        ("head", Q_NORMS),
    ),
    "gemma2": Family(
        {
            **{**GEMMA, "model_type": "gemma2", "query_pre_attn_scalar": 16, "attn_logit_softcapping": 0.5},
            **{"final_logit_softcapping": 3.0, "rope_theta": 10_000.0, "cache_implementation": "hybrid"},
        },
        (
            *(EPSILON, {"attention_softcap": None}, {"attention_softcap": 0.6}, {"logit_softcap": None}),
            *({"logit_softcap": 3.5}, {"window": None}, {"window": 4}, {"window": (None, 4)}, {"window": (5, None)}),
            *({"attention_scale": None}, {"norm_offset": False}, {"activation": "swiglu"}, {"embedding_scale": False}),
            *({"norm_position": "pre"}, {"rotary_base": 20_000.0}),
        ),
    ),
    "gemma3_text": Family(
        {
            **{**GEMMA, "model_type": "gemma3_text", "query_pre_attn_scalar": 16, "num_hidden_layers": 7},
            **{"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0, "sliding_window_pattern": 6},
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        (
            *(EPSILON, {"rotary_base": 10_000.0}, {"rotary_base": 1e6}, {"rotary_factor": 1.0}, {"rotary_factor": 8.0}),
            *({"window": None}, {"window": 4}, {"window": (4, 4, 4, 4, None, 4, 4)}, {"attention_scale": None}),
            *({"norm_offset": False}, {"embedding_scale": False}, {"activation": "swiglu"}),
        ),
        (Q_NORMS,),
    ),
}

# Encoder-decoders, as transformers 4 wrote their config.json.
T5 = {
    **{"model_type": "t5", "vocab_size": 61, "d_model": 24, "d_kv": 5, "d_ff": 40, "num_heads": 4},
    **{"num_layers": 2, "num_decoder_layers": 1, "relative_attention_num_buckets": 8, "dropout_rate": 0.1},
    **{"relative_attention_max_distance": 12, "layer_norm_epsilon": 1e-5, "initializer_factor": 1.0},
    **{"feed_forward_proj": "relu", "is_encoder_decoder": True, "n_positions": 40, "torch_dtype": "float32"},
    **{"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "output_past": True},
}
DISTANCES = (
    *({"relative_max_distance": 10}, {"relative_max_distance": 14}),
    *({"positions": "none"}, {"attention_scale": None}),
)


class PairFamily(NamedTuple):
    """As Family. `own_head`: the head isn't the embedding table; `changes` only of what the parameters allow."""

    config: dict[str, Any]
    own_head: bool
    changes: tuple[dict[str, Any], ...]


PAIR_FAMILIES = {
    "t5": PairFamily(
        T5, False, (EPSILON, *DISTANCES, {"activation": "gelu_tanh"}, {"logit_scale": None}, {"logit_scale": 0.2})
    ),
    "flan-t5": PairFamily(
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 2, "d_kv": 6},
        True,
        (EPSILON, {"activation": "swiglu"}, {"logit_scale": 24**-0.5}),
    ),
    "t5-defaults": PairFamily(
        {"model_type": "t5", "vocab_size": 67, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 1},
        False,
        ({"relative_max_distance": 64}, EPSILON),
    ),
    "t5-silu": PairFamily(
        {
            **T5,
            "feed_forward_proj": "gated-silu",
            "num_layers": 1,
            "num_decoder_layers": 2,
            "decoder_start_token_id": 3,
        },
        False,
        ({"activation": "geglu"},),
    ),
    "mt5": PairFamily(
        {**T5, "model_type": "mt5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        True,
        ({"logit_scale": 24**-0.5},),
    ),
}
