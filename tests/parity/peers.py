"""Other people's models with random weights, their weights in our layout, and the measures that compare the two.

A mapping (`tutorial_params`, `gpt2_params`, `llama_params`) only moves, joins and pads what it is given, so it maps
gradients as well as weights. Shapes: B batch, T position, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from lm.config import ModelConfig, RunConfig
from lm.nn import language_model
from lm.nn.head import token_nll


class TutorialModel(torch.nn.Module):
    """The language model of the classic PyTorch tutorial. Rows are columns here: tokens_TB."""

    def __init__(self, vocabulary: int, width: int, heads: int, hidden: int, layers: int, longest: int = 512):
        super().__init__()
        self.width = width
        self.embedding = torch.nn.Embedding(vocabulary, width)
        layer = torch.nn.TransformerEncoderLayer(width, heads, hidden, dropout=0.5)
        self.encoder = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.decoder = torch.nn.Linear(width, vocabulary)
        torch.nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        torch.nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        torch.nn.init.zeros_(self.decoder.bias)
        position = torch.arange(longest).unsqueeze(1)
        frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
        table = torch.zeros(longest, 1, width)
        table[:, 0, 0::2] = torch.sin(position * frequency)
        table[:, 0, 1::2] = torch.cos(position * frequency)
        self.register_buffer("table", table)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, tokens_TB, causal: bool = True):
        x = self.embedding(tokens_TB) * math.sqrt(self.width)
        x = self.dropout(x + self.table[: len(tokens_TB)])
        mask = torch.nn.Transformer.generate_square_subsequent_mask(len(tokens_TB)) if causal else None
        return self.decoder(self.encoder(x, mask))


def tutorial(cfg: ModelConfig) -> TutorialModel:
    """For the shape of one of our configs."""
    return TutorialModel(cfg.vocabulary, cfg.d_model, cfg.num_heads, cfg.ff_width, cfg.num_layers)


def gpt2(cfg: ModelConfig) -> transformers.GPT2LMHeadModel:
    """For the shape of one of our configs."""
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=cfg.vocabulary,
            n_positions=cfg.position_rows,
            n_embd=cfg.d_model,
            n_layer=cfg.num_layers,
            n_head=cfg.num_heads,
            n_inner=cfg.ff_width,
            activation_function="gelu_new",
            layer_norm_epsilon=cfg.norm_epsilon,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def llama(cfg: ModelConfig) -> transformers.PreTrainedModel:
    """For the shape of one of our configs: Llama, or Qwen3 where it has norms on queries and keys."""
    common = {
        "vocab_size": cfg.vocabulary,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.ff_width,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_width,
        "rms_norm_eps": cfg.norm_epsilon,
        "rope_theta": cfg.rotary_base,
        "tie_word_embeddings": cfg.tie_embeddings,
        "max_position_embeddings": 8192,
        "bos_token_id": None,
        "eos_token_id": None,
        "attention_bias": cfg.bias,
    }
    if cfg.qk_norm:
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**common))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, mlp_bias=cfg.bias))


def randomized(model, *, table_std: float, gain: float):
    """The model in evaluation mode with every weight drawn: no bias stays 0, no norm 1, for a test to overlook.

    `table_std` is that of the embeddings: small ones make a norm's epsilon count. `gain` multiplies the matrices of the
    layers: above 1 attention is sharp, so that what a token sees decides what it says.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                table = any(part in name for part in ("embed", "wte", "wpe"))
                std = (
                    table_std
                    if table
                    else weight.shape[-1] ** -0.5 * (gain if ".layers." in name or ".h." in name else 1)
                )
                weight.normal_(0, std, generator=generator)
            else:
                norm = name.endswith("weight")
                weight.normal_(1.0 if norm else 0.0, 0.3, generator=generator)
    return model.eval()


def weights(model) -> dict[str, np.ndarray]:
    """By name. A tied head has none of its own."""
    return {name: weight.detach().numpy() for name, weight in model.named_parameters()}


def gradients(model) -> dict[str, np.ndarray]:
    """By name, as the last backward pass left them."""
    return {name: weight.grad.numpy() for name, weight in model.named_parameters()}


def tutorial_params(found: dict[str, np.ndarray], cfg: ModelConfig):
    def layer(at: str):
        qkv, qkv_bias = found[at + "self_attn.in_proj_weight"].T, found[at + "self_attn.in_proj_bias"]
        return {
            "attention_norm": {"scale": found[at + "norm1.weight"], "bias": found[at + "norm1.bias"]},
            "attention": {
                "qkv": _fused(*np.split(qkv, 3, axis=-1), cfg),
                "qkv_bias": _fused(*np.split(qkv_bias, 3), cfg),
                "out": _by_head(found[at + "self_attn.out_proj.weight"].T, cfg),
                "out_bias": found[at + "self_attn.out_proj.bias"],
            },
            "feed_forward_norm": {"scale": found[at + "norm2.weight"], "bias": found[at + "norm2.bias"]},
            "feed_forward": {
                "up": found[at + "linear1.weight"].T,
                "up_bias": found[at + "linear1.bias"],
                "down": found[at + "linear2.weight"].T,
                "down_bias": found[at + "linear2.bias"],
            },
        }

    return {
        "embed": {"tokens": _padded(found["embedding.weight"], cfg)},
        "layers": _stacked([layer(f"encoder.layers.{i}.") for i in range(cfg.num_layers)]),
        "head": {"kernel": _padded(found["decoder.weight"], cfg).T, "bias": _padded(found["decoder.bias"], cfg)},
    }


def gpt2_params(found: dict[str, np.ndarray], cfg: ModelConfig):
    def layer(at: str):
        return {
            "attention_norm": {"scale": found[at + "ln_1.weight"], "bias": found[at + "ln_1.bias"]},
            "attention": {
                "qkv": _fused(*np.split(found[at + "attn.c_attn.weight"], 3, axis=-1), cfg),
                "qkv_bias": _fused(*np.split(found[at + "attn.c_attn.bias"], 3), cfg),
                "out": _by_head(found[at + "attn.c_proj.weight"], cfg),
                "out_bias": found[at + "attn.c_proj.bias"],
            },
            "feed_forward_norm": {"scale": found[at + "ln_2.weight"], "bias": found[at + "ln_2.bias"]},
            "feed_forward": {
                "up": found[at + "mlp.c_fc.weight"],
                "up_bias": found[at + "mlp.c_fc.bias"],
                "down": found[at + "mlp.c_proj.weight"],
                "down_bias": found[at + "mlp.c_proj.bias"],
            },
        }

    return {
        "embed": {
            "tokens": _padded(found["transformer.wte.weight"], cfg),
            "positions": found["transformer.wpe.weight"],
        },
        "layers": _stacked([layer(f"transformer.h.{i}.") for i in range(cfg.num_layers)]),
        "norm": {"scale": found["transformer.ln_f.weight"], "bias": found["transformer.ln_f.bias"]},
    }


def llama_params(found: dict[str, np.ndarray], cfg: ModelConfig):
    def layer(at: str):
        def linear(name: str, kind: str = "weight"):
            return found[f"{at}{name}_proj.{kind}"].T

        attention = {
            "qkv": _fused(*(linear(f"self_attn.{name}") for name in "qkv"), cfg),
            "out": _by_head(linear("self_attn.o"), cfg),
        }
        feed_forward = {name: linear(f"mlp.{name}") for name in ("up", "gate", "down")}
        if cfg.bias:
            attention["qkv_bias"] = _fused(*(linear(f"self_attn.{name}", "bias") for name in "qkv"), cfg)
            attention["out_bias"] = linear("self_attn.o", "bias")
            feed_forward |= {f"{name}_bias": linear(f"mlp.{name}", "bias") for name in ("up", "gate", "down")}
        if cfg.qk_norm:
            attention["q_norm"] = {"scale": found[at + "self_attn.q_norm.weight"]}
            attention["k_norm"] = {"scale": found[at + "self_attn.k_norm.weight"]}
        return {
            "attention_norm": {"scale": found[at + "input_layernorm.weight"]},
            "attention": attention,
            "feed_forward_norm": {"scale": found[at + "post_attention_layernorm.weight"]},
            "feed_forward": feed_forward,
        }

    params = {
        "embed": {"tokens": _padded(found["model.embed_tokens.weight"], cfg)},
        "layers": _stacked([layer(f"model.layers.{i}.") for i in range(cfg.num_layers)]),
        "norm": {"scale": found["model.norm.weight"]},
    }
    if not cfg.tie_embeddings:
        params["head"] = {"kernel": _padded(found["lm_head.weight"], cfg).T}
    return params


def _fused(q, k, v, cfg: ModelConfig):
    """[..., heads * H] each to [..., K, (G + 2) H]: a key/value head with the queries that read it."""

    def grouped(x, heads: int):
        return x.reshape(*x.shape[:-1], cfg.kv_heads, heads * cfg.head_width)

    return np.concatenate([grouped(q, cfg.num_heads // cfg.kv_heads), grouped(k, 1), grouped(v, 1)], axis=-1)


def _by_head(out, cfg: ModelConfig):
    return out.reshape(cfg.num_heads, cfg.head_width, cfg.d_model)


def _padded(table, cfg: ModelConfig):
    more = cfg.padded_vocabulary - len(table)
    return np.pad(table, [(0, more)] + [(0, 0)] * (table.ndim - 1))


def _stacked(layers):
    return jax.tree.map(lambda *each: np.stack(each), *layers)


class Family(NamedTuple):
    """Whose model, how to build it, how its weights become ours, the shape of ours, and its embeddings' scale."""

    build: object
    params: object
    config: ModelConfig
    table_std: float

    def model(self, cfg: ModelConfig, gain: float = 1.0):
        return randomized(self.build(cfg), table_std=self.table_std, gain=gain)


def resolved(model: ModelConfig, vocabulary: int, positions: int) -> ModelConfig:
    config = RunConfig(model=dataclasses.replace(model, max_positions=positions))
    return config.resolve(vocabulary).model


GPT2 = Family(
    gpt2,
    gpt2_params,
    ModelConfig(num_layers=2, d_model=48, num_heads=4, bias=True, activation="gelu_tanh", positions="learned"),
    table_std=0.01,
)
LLAMA = Family(
    llama,
    llama_params,
    ModelConfig(
        num_layers=2,
        d_model=48,
        num_heads=6,
        num_kv_heads=2,
        d_ff=80,
        norm="rmsnorm",
        activation="swiglu",
        positions="rotary",
        tie_embeddings=False,
    ),
    table_std=0.01,
)
QWEN3 = LLAMA._replace(config=dataclasses.replace(LLAMA.config, qk_norm=True, head_dim=12, rotary_base=1e6))


def their_logits(model, tokens_BT: np.ndarray, **options) -> torch.Tensor:
    """logits_BTV of any of the models, with their graph."""
    tokens = torch.tensor(tokens_BT)
    if isinstance(model, TutorialModel):
        return model(tokens.T, **options).transpose(0, 1)
    return model(input_ids=tokens, use_cache=False, **options).logits


def mean_nll(logits_BTV: torch.Tensor, targets_BT: np.ndarray) -> torch.Tensor:
    """Mean negative log-likelihood of the targets; those at -100 don't count."""
    targets = torch.tensor(targets_BT, dtype=torch.long)
    return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets.flatten())


@functools.partial(jax.jit, static_argnames="cfg")
def our_gradients(params, tokens_BT, targets_BT, *, cfg: ModelConfig):
    """((loss, logits_BTV), gradients) of the mean negative log-likelihood of the targets."""

    def loss(params):
        logits_BTV = language_model.apply(params, tokens_BT, cfg=cfg)
        return jnp.mean(token_nll(logits_BTV, targets_BT)), logits_BTV

    return jax.value_and_grad(loss, has_aux=True)(params)


def some_ids(cfg: ModelConfig, rows: int, length: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, cfg.vocabulary, (rows, length), np.int32)


def difference(ours, theirs) -> float:
    """max |ours - theirs| / max |theirs|."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))


def logits_difference(
    family: Family, model, cfg: ModelConfig, tokens_BT, positions_BT=None, *, ours=None, params=None, **theirs
) -> float:
    """Of our logits from theirs. `ours` and `params` replace our config and parameters, `theirs` are their options."""
    with torch.no_grad():
        expected = their_logits(model, tokens_BT, **theirs)
    params = family.params(weights(model), cfg) if params is None else params
    # Not compiled: that takes longer than the few products of one pass.
    logits_BTV = language_model.apply(params, tokens_BT, None, positions_BT, cfg=ours or cfg)
    return difference(unpadded(logits_BTV, cfg), expected)


def differences(family: Family, model, cfg: ModelConfig, ids_BT: np.ndarray) -> dict[str, float]:
    """Of our "logits" and "loss" from theirs, and of our gradient of every parameter by its path."""
    tokens_BT, targets_BT = ids_BT[:, :-1], ids_BT[:, 1:]
    model.zero_grad()
    expected_logits = their_logits(model, tokens_BT)
    expected_loss = mean_nll(expected_logits, targets_BT)
    expected_loss.backward()
    expected = family.params(gradients(model), cfg)
    (loss, logits_BTV), found = our_gradients(family.params(weights(model), cfg), tokens_BT, targets_BT, cfg=cfg)
    tree = jax.tree.map(difference, found, expected)
    return {
        "logits": difference(unpadded(logits_BTV, cfg), expected_logits.detach()),
        "loss": difference(loss, expected_loss.detach()),
        **{jax.tree_util.keystr(path): value for path, value in jax.tree_util.tree_leaves_with_path(tree)},
    }


def unpadded(logits_BTV, cfg: ModelConfig) -> np.ndarray:
    """The logits of real tokens, after a look at those of the padding."""
    logits_BTV = np.asarray(logits_BTV)
    assert np.all(np.isneginf(logits_BTV[..., cfg.vocabulary :]))
    return logits_BTV[..., : cfg.vocabulary]
