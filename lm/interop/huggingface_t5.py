"""config.json of T5, Flan-T5 and mT5 (Raffel et al. 2020, arXiv:1910.10683), and of encoder-decoders that aren't.

Version 1.0 has ReLU and a head that is the embedding table, read at d_model**-0.5; 1.1, Flan-T5 and mT5 have a gate and
a head of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm.config import InputError, ModelConfig
from lm.interop.huggingface_fields import PLAIN, Fields, called

_GATED = {"gelu_new": "geglu", "gelu_pytorch_tanh": "geglu", "silu": "swiglu", "swish": "swiglu"}
ACTIVATIONS = {"gated-gelu": "geglu", **{f"gated-{name}": ours for name, ours in _GATED.items()}, **PLAIN}
"""feed_forward_proj and ours: "gated-gelu" is transformers' gelu_new, the tanh form, "gelu" the exact one."""
T5 = {
    **{"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    **{"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6},
    **{"feed_forward_proj": "relu", "tie_word_embeddings": True, "is_encoder_decoder": True, "pad_token_id": 0},
    "n_positions": 512,
}
MT5 = {**T5, "vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu"}
HARMLESS = ("classifier_dropout", "dropout_rate", "initializer_factor", "output_past")
FARTHEST = 1 << 20
"""Tokens from which a distance may count as the farthest: a table has an entry for each that is less."""
_KNOWN = "of encoder-decoders lm opens those of model_type t5 (Flan-T5 among them) and mt5"


def read(f: Fields, *, scaled: bool) -> ModelConfig:
    """`scaled`: the family may scale what the head reads. n_positions, or 512, bounds nothing: it becomes data.context.

    Raises InputError for an encoder without a decoder, and for buckets of distances that can't be filled.
    """
    _check_kind(f)
    width, vocabulary = f.get("d_model", int), f.get("vocab_size", int)
    layers, tied = f.get("num_layers", int), f.get("tie_word_embeddings", bool)
    decoder_layers = f.maybe("num_decoder_layers", int)
    # transformers 5 always writes tie_word_embeddings true, and the scale, which version 4 inferred from it, apart
    scale = f.maybe("scale_decoder_outputs", bool) if scaled else False
    scale = tied if scale is None else scale
    start = f.maybe("decoder_start_token_id", int)
    start = f.get("pad_token_id", int) if start is None else start
    if not 0 <= start < vocabulary:
        raise f.refuse("decoder_start_token_id", start, f"is not in the vocabulary of {vocabulary}")
    buckets, farthest = (f.get(f"relative_attention_{name}", int) for name in ("num_buckets", "max_distance"))
    if buckets < 4:
        raise f.refuse("relative_attention_num_buckets", buckets, "is less than 4, two for either side of a token")
    if not buckets // 2 < farthest <= FARTHEST:
        why = f"is not from {buckets // 2 + 1}, more than half of relative_attention_num_buckets, to {FARTHEST}"
        raise f.refuse("relative_attention_max_distance", farthest, why)
    return ModelConfig(
        family="encoder_decoder",
        num_layers=layers if decoder_layers is None else decoder_layers,
        encoder_layers=layers,
        d_model=width,
        num_heads=f.get("num_heads", int),
        head_dim=f.get("d_kv", int),
        d_ff=f.get("d_ff", int),
        norm="rmsnorm",
        norm_epsilon=f.get("layer_norm_epsilon", float),
        activation=_activation(f),  # type: ignore[arg-type]
        positions="relative",
        max_positions=f.get("n_positions", int),
        relative_buckets=buckets,
        relative_max_distance=farthest,
        attention_scale=1.0,
        tie_embeddings=tied,
        logit_scale=width**-0.5 if scale else None,
        vocab_size=vocabulary,
        start_id=start,
        vocab_multiple=1,
    )


def write(cfg: ModelConfig, *, scaled: bool) -> dict[str, Any]:
    """A head that is tied and not scaled, or the reverse, is understood by transformers 5 alone."""
    scale = {"scale_decoder_outputs": cfg.logit_scale is not None} if scaled else {}
    return {
        "num_layers": cfg.source_layers,
        "num_decoder_layers": cfg.num_layers,
        "d_model": cfg.d_model,
        "num_heads": cfg.num_heads,
        "d_kv": cfg.head_width,
        "d_ff": cfg.ff_width,
        "layer_norm_epsilon": cfg.norm_epsilon,
        "feed_forward_proj": called(cfg, ACTIVATIONS),
        "n_positions": cfg.position_rows,
        "relative_attention_num_buckets": cfg.relative_buckets,
        "relative_attention_max_distance": cfg.relative_max_distance,
        "tie_word_embeddings": cfg.tie_embeddings,
        **scale,
        "vocab_size": cfg.vocabulary,
        "decoder_start_token_id": cfg.start_id,
        "is_encoder_decoder": True,
        "dropout_rate": cfg.dropout,
    }


def check_others(values: Mapping[str, Any], where: Any) -> None:
    """Raises InputError for the encoder-decoders of a config.json that are none of these."""
    kind = values.get("model_type")
    if kind == "umt5":
        raise InputError(f"{where}: model_type 'umt5' has a relative bias in every layer, not one a stack; {_KNOWN}")
    if values.get("is_encoder_decoder") is True:
        raise InputError(f"{where}: model_type {kind!r} is not implemented; {_KNOWN}")


def _check_kind(f: Fields) -> None:
    """An encoder alone says so in two places, of which an older file has one."""
    names = f.maybe("architectures", list) or []
    alone = next((name for name in names if str(name).endswith("EncoderModel")), None)
    if alone is not None or not f.get("is_encoder_decoder", bool):
        field, value = ("architectures", names) if alone is not None else ("is_encoder_decoder", False)
        raise f.refuse(field, value, "says that this is an encoder alone, which writes no text: open the whole model")


def _activation(f: Fields) -> str:
    """feed_forward_proj; what transformers 4.20 and later write of it besides must agree."""
    ours = f.choice("feed_forward_proj", ACTIVATIONS)
    gate = f.get("feed_forward_proj", str).rpartition("-")[0]
    gated, act = f.maybe("is_gated_act", bool), f.maybe("dense_act_fn", str)
    if gated is not None and gated != bool(gate):
        raise f.refuse("is_gated_act", gated, f"contradicts feed_forward_proj {f.get('feed_forward_proj', str)!r}")
    if act is not None and (_GATED if gate else PLAIN).get(act) != ours:
        raise f.refuse("dense_act_fn", act, f"contradicts feed_forward_proj {f.get('feed_forward_proj', str)!r}")
    return ours
