"""Other people's models with random weights, their weights in our layout, and the measures that compare the two.

`lm.interop` only moves, joins and pads what it is given, so it maps gradients as well as weights. Shapes: B batch, T
position, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from lm.config import ModelConfig, RunConfig
from lm.interop import huggingface_weights, torch_transformer
from lm.interop.weights import Weight, assemble
from lm.nn import language_model
from lm.nn.head import token_nll


class TutorialModel(torch.nn.Module):
    """The language model of the classic PyTorch tutorial. Rows are columns here: tokens_TB."""

    def __init__(self, vocabulary: int, width: int, heads: int, hidden: int, layers: int, longest: int = 512):
        super().__init__()
        self.width = width
        self.encoder = torch.nn.Embedding(vocabulary, width)
        layer = torch.nn.TransformerEncoderLayer(width, heads, hidden, dropout=0.5)
        self.transformer_encoder = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.decoder = torch.nn.Linear(width, vocabulary)
        torch.nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        torch.nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        torch.nn.init.zeros_(self.decoder.bias)
        position = torch.arange(longest).unsqueeze(1)
        frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
        table = torch.zeros(longest, 1, width)
        table[:, 0, 0::2] = torch.sin(position * frequency)
        table[:, 0, 1::2] = torch.cos(position * frequency)
        self.pos_encoder = torch.nn.Module()
        self.pos_encoder.register_buffer("pe", table)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, tokens_TB, causal: bool = True):
        x = self.encoder(tokens_TB) * math.sqrt(self.width)
        x = self.dropout(x + self.pos_encoder.pe[: len(tokens_TB)])
        mask = torch.nn.Transformer.generate_square_subsequent_mask(len(tokens_TB)) if causal else None
        return self.decoder(self.transformer_encoder(x, mask))


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
                table = name == "encoder.weight" or any(part in name for part in ("embed", "wte", "wpe", "shared"))
                std = (
                    table_std
                    if table
                    else weight.shape[-1] ** -0.5
                    * (gain if any(part in name for part in (".layers.", ".h.", ".block.")) else 1)
                )
                weight.normal_(0, std, generator=generator)
            else:
                norm = name.endswith("weight")
                weight.normal_(1.0 if norm else 0.0, 0.3, generator=generator)
    return model.eval()


def random_pair_model(family, folder: Path, dtype: str = "float32"):
    """An encoder-decoder of a PairFamily with every weight drawn, and its folder, as transformers saves it.

    Sources are `some_ids`, decoding starts with config's decoder_start_token_id, of T5 0.
    """
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(family.config))
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    if family.own_head:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    # A tied head gives the token that was read, if its own embedding is large beside what the layers add to it.
    model = randomized(model, table_std=0.5 if family.own_head else 0.12, gain=1.25)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("Attention.q.weight"):  # scores aren't divided by the width of a head
                weight.mul_(config.d_kv**-0.5)
            if name.endswith("EncDecAttention.o.weight"):  # so that what is written depends on the source
                weight.mul_(2.0)
        if not family.own_head:  # the table is small, and so would all logits be
            model.decoder.final_layer_norm.weight.mul_(16.0)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return model.to(torch.float32)


def weights(model) -> dict[str, np.ndarray]:
    """By name. A tied head has none of its own."""
    return {name: weight.detach().numpy() for name, weight in model.named_parameters()}


def gradients(model) -> dict[str, np.ndarray]:
    """By name, as the last backward pass left them."""
    return {name: weight.grad.numpy() for name, weight in model.named_parameters()}


def tutorial_params(found: dict[str, np.ndarray], cfg: ModelConfig):
    return _params(found, list(torch_transformer.tensors(cfg)), cfg)


def gpt2_params(found: dict[str, np.ndarray], cfg: ModelConfig):
    return _huggingface_params(found, cfg, "gpt2")


def llama_params(found: dict[str, np.ndarray], cfg: ModelConfig):
    return _huggingface_params(found, cfg, "llama")


def _huggingface_params(found: dict[str, np.ndarray], cfg: ModelConfig, model_type: str):
    short = {huggingface_weights.canonical(name): array for name, array in found.items()}
    return _params(short, list(huggingface_weights.weights(cfg, model_type)), cfg)


def _params(found: dict[str, np.ndarray], weights: list[Weight], cfg: ModelConfig):
    """Numpy arrays, so that tests can change them."""
    assert set(found) == {weight.name for weight in weights}
    return jax.tree.map(np.array, assemble(cfg, weights, lambda weight: found[weight.name], dtype="float32"))


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
