"""What the tensors of a Hugging Face model are called, and which of our parameters each one is.

Shapes: D model width, N query heads, K key/value heads, H head width, F feed-forward width, V vocabulary, P positions,
R buckets of distances.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from lm.config import GATED, ModelConfig
from lm.interop.weights import Weight, fused, query_key_value

HEAD = "lm_head.weight"
_T5 = ("t5", "mt5")
_IGNORED = re.compile(
    r"(.*\.)?rotary_emb\.inv_freq|(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)|(.*\.)?embed_tokens\.embed_scale"
    r"|(model\.)?(vision_tower|multi_modal_projector)\..*"
    r"|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
)
_PREFIX = re.compile(r"(transformer|model\.language_model|language_model\.model|language_model|model)\.")


def canonical(name: str) -> str | None:
    """A tensor's name without that of the model it is in ("h.0.ln_1.bias", "layers.0.mlp.up_proj.weight", HEAD).

    None: no weight of the language model, but what older versions saved without a use, or of an image tower.
    """
    return None if _IGNORED.fullmatch(name) else _PREFIX.sub("", name, count=1) if _PREFIX.match(name) else name


def prefixed(name: str, model_type: str) -> str:
    """A canonical name as transformers writes it."""
    if name == HEAD or model_type in _T5:
        return name
    return f"{'transformer' if model_type == 'gpt2' else 'model'}.{name}"


def weights(cfg: ModelConfig, model_type: str) -> Iterator[Weight]:
    """All that a model of the family has, by canonical names, in the order in which transformers writes them."""
    if model_type in _T5:
        yield from _t5(cfg)
    else:
        yield from _gpt2(cfg) if model_type == "gpt2" else _llama(cfg)
    if not cfg.tie_embeddings:
        yield head(cfg)


def copies(cfg: ModelConfig, model_type: str) -> tuple[str, ...]:
    """The tensors that a file may have besides the embedding table, or in its place, and that are the same."""
    sides = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight") if model_type in _T5 else ()
    return (*sides, HEAD) if cfg.tie_embeddings else sides


def head(cfg: ModelConfig) -> Weight:
    pieces = ((np.s_[...], np.s_[:, : cfg.vocabulary]),)
    return Weight(HEAD, (cfg.vocabulary, cfg.d_model), ("head", "kernel"), transposed=True, pieces=pieces)


def embedding(name: str, cfg: ModelConfig) -> Weight:
    pieces = ((np.s_[...], np.s_[: cfg.vocabulary]),)
    return Weight(name, (cfg.vocabulary, cfg.d_model), ("embed", "tokens"), pieces=pieces)


def _gpt2(cfg: ModelConfig) -> Iterator[Weight]:
    """Its linear layers have inputs first, and one for queries, keys and values."""
    D, F, NH = cfg.d_model, cfg.ff_width, cfg.num_heads * cfg.head_width
    yield embedding("wte.weight", cfg)
    yield Weight("wpe.weight", (cfg.position_rows, D), ("embed", "positions"))
    for i in range(cfg.num_layers):
        for theirs, ours in (("ln_1", "attention_norm"), ("ln_2", "feed_forward_norm")):
            yield Weight(f"h.{i}.{theirs}.weight", (D,), ("layers", ours, "scale"), i)
            yield Weight(f"h.{i}.{theirs}.bias", (D,), ("layers", ours, "bias"), i)
        attention, feed_forward = ("layers", "attention"), ("layers", "feed_forward")
        yield Weight(f"h.{i}.attn.c_attn.weight", (D, 3 * NH), (*attention, "qkv"), i, pieces=fused(cfg))
        yield Weight(f"h.{i}.attn.c_attn.bias", (3 * NH,), (*attention, "qkv_bias"), i, pieces=fused(cfg))
        yield Weight(f"h.{i}.attn.c_proj.weight", (NH, D), (*attention, "out"), i)
        yield Weight(f"h.{i}.attn.c_proj.bias", (D,), (*attention, "out_bias"), i)
        yield Weight(f"h.{i}.mlp.c_fc.weight", (D, F), (*feed_forward, "up"), i)
        yield Weight(f"h.{i}.mlp.c_fc.bias", (F,), (*feed_forward, "up_bias"), i)
        yield Weight(f"h.{i}.mlp.c_proj.weight", (F, D), (*feed_forward, "down"), i)
        yield Weight(f"h.{i}.mlp.c_proj.bias", (D,), (*feed_forward, "down_bias"), i)
    yield Weight("ln_f.weight", (D,), ("norm", "scale"))
    yield Weight("ln_f.bias", (D,), ("norm", "bias"))


def _llama(cfg: ModelConfig) -> Iterator[Weight]:
    """Llama and those after it. Linear layers have outputs first."""
    D = cfg.d_model
    yield embedding("embed_tokens.weight", cfg)
    norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "feed_forward_norm"}
    if cfg.norm_position == "both":
        norms = {
            "input_layernorm": "attention_norm",
            "post_attention_layernorm": "attention_output_norm",
            "pre_feedforward_layernorm": "feed_forward_norm",
            "post_feedforward_layernorm": "feed_forward_output_norm",
        }
    for i in range(cfg.num_layers):
        yield from _llama_attention(cfg, f"layers.{i}.self_attn", i)
        yield from _llama_feed_forward(cfg, f"layers.{i}.mlp", i)
        for theirs, ours in norms.items():
            yield Weight(f"layers.{i}.{theirs}.weight", (D,), ("layers", ours, "scale"), i)
    yield Weight("norm.weight", (D,), ("norm", "scale"))


def _llama_attention(cfg: ModelConfig, at: str, i: int) -> Iterator[Weight]:
    D, H, ours = cfg.d_model, cfg.head_width, ("layers", "attention")
    heads = zip("qkv", (cfg.num_heads, cfg.kv_heads, cfg.kv_heads), query_key_value(cfg), strict=True)
    for name, count, place in heads:
        where = ((np.s_[...], place),)
        yield Weight(f"{at}.{name}_proj.weight", (count * H, D), (*ours, "qkv"), i, True, where)
        if cfg.has_qkv_bias:
            yield Weight(f"{at}.{name}_proj.bias", (count * H,), (*ours, "qkv_bias"), i, pieces=where)
    yield Weight(f"{at}.o_proj.weight", (D, cfg.num_heads * H), (*ours, "out"), i, True)
    if cfg.bias:
        yield Weight(f"{at}.o_proj.bias", (D,), (*ours, "out_bias"), i)
    if cfg.qk_norm:
        yield Weight(f"{at}.q_norm.weight", (H,), (*ours, "q_norm", "scale"), i)
        yield Weight(f"{at}.k_norm.weight", (H,), (*ours, "k_norm", "scale"), i)


def _llama_feed_forward(cfg: ModelConfig, at: str, i: int) -> Iterator[Weight]:
    D, F, ours = cfg.d_model, cfg.ff_width, ("layers", "feed_forward")
    for name, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
        yield Weight(f"{at}.{name}_proj.weight", shape, (*ours, name), i, True)
        if cfg.bias:
            yield Weight(f"{at}.{name}_proj.bias", shape[:1], (*ours, f"{name}_bias"), i)


def _t5(cfg: ModelConfig) -> Iterator[Weight]:
    """Two stacks, the decoder's with cross-attention. Linear layers have outputs first."""
    yield embedding("shared.weight", cfg)
    for side, ours, layers in (("encoder", ("encoder",), cfg.source_layers), ("decoder", (), cfg.num_layers)):
        first = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        yield Weight(first, (cfg.relative_buckets, cfg.num_heads), (*ours, "relative"))
        for i in range(layers):
            yield from _t5_layer(cfg, f"{side}.block.{i}.layer", (*ours, "layers"), i, decoder=side == "decoder")
        yield Weight(f"{side}.final_layer_norm.weight", (cfg.d_model,), (*ours, "norm", "scale"))


def _t5_layer(cfg: ModelConfig, at: str, ours: tuple[str, ...], i: int, *, decoder: bool) -> Iterator[Weight]:
    D, F = cfg.d_model, cfg.ff_width
    NH, H = cfg.num_heads * cfg.head_width, cfg.head_width
    blocks = [("attention", "SelfAttention", ("qkv",) * 3, query_key_value(cfg))]
    if decoder:
        places = np.s_[...], np.s_[..., :H], np.s_[..., H:]
        blocks.append(("cross_attention", "EncDecAttention", ("q", "kv", "kv"), places))
    for number, (name, theirs, matrices, places) in enumerate(blocks):
        for letter, matrix, place in zip("qkv", matrices, places, strict=True):
            where = ((np.s_[...], place),)
            yield Weight(f"{at}.{number}.{theirs}.{letter}.weight", (NH, D), (*ours, name, matrix), i, True, where)
        yield Weight(f"{at}.{number}.{theirs}.o.weight", (D, NH), (*ours, name, "out"), i, True)
        yield Weight(f"{at}.{number}.layer_norm.weight", (D,), (*ours, f"{name}_norm", "scale"), i)
    last = f"{at}.{len(blocks)}"
    gated = {"wi_0": "gate", "wi_1": "up"} if cfg.activation in GATED else {"wi": "up"}
    for theirs, matrix in gated.items():
        yield Weight(f"{last}.DenseReluDense.{theirs}.weight", (F, D), (*ours, "feed_forward", matrix), i, True)
    yield Weight(f"{last}.DenseReluDense.wo.weight", (D, F), (*ours, "feed_forward", "down"), i, True)
    yield Weight(f"{last}.layer_norm.weight", (D,), (*ours, "feed_forward_norm", "scale"), i)
