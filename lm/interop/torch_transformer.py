"""Language models built on torch.nn.TransformerEncoder, as the classic PyTorch tutorial builds them, as safetensors.

    encoder.weight (or embedding.weight)                    the embedding, times sqrt(width)
    pos_encoder.pe                                          sinusoids, a buffer that may be absent
    transformer_encoder.layers.N. (or encoder.layers.N.)    post-norm layers: self_attn, linear1, linear2, norm1, norm2
    decoder.weight, decoder.bias (or linear.)               the head

In torch: `safetensors.torch.save_file(model.state_dict(), path)`, and `model.load_state_dict(load_file(path))`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lm.config import InputError, ModelConfig
from lm.interop import weights
from lm.interop.huggingface_config import arithmetic
from lm.interop.safetensors_files import Tensor, open_file, open_folder, write_file
from lm.interop.weights import Weight, fused
from lm.nn.layers import sinusoidal

_TABLE = "pos_encoder.pe"
_TOLERANCE = 2e-3
"""Of sinusoids: at position 5000 an angle in float32 is off by up to 2.4e-4 radians, and torch rounds it elsewhere."""


class Names(NamedTuple):
    """What a model calls its parts."""

    embedding: str
    layers: str
    head: str


TUTORIAL = Names("encoder", "transformer_encoder.layers", "decoder")
_EMBEDDINGS, _LAYERS = ("encoder", "embedding"), ("transformer_encoder.layers", "encoder.layers")
_HEADS = ("decoder", "linear")


def load_state_dict(
    path: str | Path, num_heads: int, *, max_positions: int = 5000, dtype: str = "float32"
) -> tuple[ModelConfig, dict[str, Any]]:
    """The config and the parameters of a model's state, a safetensors file or a folder of them.

    Args:
      num_heads: the tutorial's nhead, which the state doesn't tell.
      max_positions: tokens that the model is meant for; the sinusoids go on.

    Raises InputError for a state that is no such model's. Activation (ReLU), norm placement (after) and epsilon (1e-5)
    aren't in the state: they are TransformerEncoderLayer's defaults.
    """
    path = Path(path)
    found = open_folder(path) if path.is_dir() else open_file(path)
    names = _names(found, path)
    vocabulary, width = _shape(found, f"{names.embedding}.weight", 2, path)
    hidden, _ = _shape(found, f"{names.layers}.0.linear1.weight", 2, path)
    if num_heads < 1 or width % num_heads:
        raise InputError(f"num_heads {num_heads} does not divide the width {width} of {path}")
    number = re.compile(rf"{re.escape(names.layers)}\.(\d+)\.")
    layers = 1 + max(int(place[1]) for name in found if (place := number.match(name)))
    cfg = _config(layers, width, num_heads, hidden, vocabulary, max_positions)
    table = found.pop(_TABLE, None)
    if table is not None:
        _check_sinusoids(table, width, path)
    wanted = list(tensors(cfg, names))
    weights.check(wanted, found, path)
    return cfg, weights.read(cfg, wanted, found, dtype=dtype)


def save_state_dict(
    path: str | Path, cfg: ModelConfig, params: Mapping[str, Any], *, names: Names = TUTORIAL, positions: int = 5000
) -> Path:
    """Writes parameters as the state of such a model, with a pos_encoder.pe of `positions` rows.

    Raises InputError, naming the fields, for a config that isn't the tutorial's.
    """
    path = Path(path)
    asked = arithmetic(cfg)
    made = arithmetic(
        _config(cfg.num_layers, cfg.d_model, cfg.num_heads, cfg.ff_width, cfg.vocabulary, cfg.max_positions)
    )
    if other := [f"model.{name} {asked[name]!r} (not {made[name]!r})" for name in asked if asked[name] != made[name]]:
        raise InputError(f"this is not the model of PyTorch's tutorial: it differs in {', '.join(other)}")
    by_name = {weight.name: weight for weight in tensors(cfg, names)}
    shapes = {name: weight.shape for name, weight in by_name.items()}

    def read(name: str) -> np.ndarray:
        return _sinusoids(positions, cfg.d_model)[:, None] if name == _TABLE else by_name[name].take(params)

    write_file(path, {_TABLE: (positions, 1, cfg.d_model), **shapes}, read, dtype="float32")
    return path


def _config(
    layers: int, width: int, heads: int, hidden: int, vocabulary: int, max_positions: int | None
) -> ModelConfig:
    return ModelConfig(
        num_layers=layers,
        d_model=width,
        num_heads=heads,
        d_ff=hidden,
        norm_position="post",
        activation="relu",
        positions="sinusoidal",
        max_positions=max_positions,
        tie_embeddings=False,
        bias=True,
        head_bias=True,
        embedding_scale=True,
        initializer="torch",
        vocab_size=vocabulary,
        vocab_multiple=1,
    )


def tensors(cfg: ModelConfig, names: Names = TUTORIAL) -> Iterator[Weight]:
    """All that such a model's state has, but the sinusoids."""
    D, F, V = cfg.d_model, cfg.ff_width, cfg.vocabulary
    rows, columns, last = np.s_[:V], np.s_[:, :V], np.s_[...]
    yield Weight(f"{names.embedding}.weight", (V, D), ("embed", "tokens"), pieces=((last, rows),))
    for i in range(cfg.num_layers):
        at, attention, feed_forward = f"{names.layers}.{i}", ("layers", "attention"), ("layers", "feed_forward")
        yield Weight(f"{at}.self_attn.in_proj_weight", (3 * D, D), (*attention, "qkv"), i, True, fused(cfg))
        yield Weight(f"{at}.self_attn.in_proj_bias", (3 * D,), (*attention, "qkv_bias"), i, pieces=fused(cfg))
        yield Weight(f"{at}.self_attn.out_proj.weight", (D, D), (*attention, "out"), i, True)
        yield Weight(f"{at}.self_attn.out_proj.bias", (D,), (*attention, "out_bias"), i)
        yield Weight(f"{at}.linear1.weight", (F, D), (*feed_forward, "up"), i, True)
        yield Weight(f"{at}.linear1.bias", (F,), (*feed_forward, "up_bias"), i)
        yield Weight(f"{at}.linear2.weight", (D, F), (*feed_forward, "down"), i, True)
        yield Weight(f"{at}.linear2.bias", (D,), (*feed_forward, "down_bias"), i)
        for theirs, ours in (("norm1", "attention_norm"), ("norm2", "feed_forward_norm")):
            yield Weight(f"{at}.{theirs}.weight", (D,), ("layers", ours, "scale"), i)
            yield Weight(f"{at}.{theirs}.bias", (D,), ("layers", ours, "bias"), i)
    yield Weight(f"{names.head}.weight", (V, D), ("head", "kernel"), transposed=True, pieces=((last, columns),))
    yield Weight(f"{names.head}.bias", (V,), ("head", "bias"), pieces=((last, rows),))


def _names(found: Mapping[str, Tensor], path: Path) -> Names:
    def first(choices: tuple[str, ...], end: str) -> str:
        there = [name for name in choices if name + end in found]
        if not there:
            wanted = " or ".join(name + end for name in choices)
            raise InputError(f"{path} has no {wanted}: it is no state of a model on torch.nn.TransformerEncoder")
        return there[0]

    return Names(first(_EMBEDDINGS, ".weight"), first(_LAYERS, ".0.linear1.weight"), first(_HEADS, ".weight"))


def _shape(found: Mapping[str, Tensor], name: str, axes: int, path: Path) -> tuple[int, ...]:
    shape = found[name].shape
    if len(shape) != axes:
        raise InputError(f"{path}: {name} has shape {list(shape)}, it must have {axes} axes")
    return shape


def _check_sinusoids(table: Tensor, width: int, path: Path) -> None:
    """The buffer holds rows of sinusoids, with an axis of length 1 before or behind its rows."""
    found = table.read(_TABLE).reshape(-1, width) if table.shape[-1:] == (width,) else np.zeros((0, width))
    if found.size == 0 or not np.allclose(found, _sinusoids(len(found), width), atol=_TOLERANCE):
        raise InputError(
            f"{path}: {_TABLE} doesn't hold the sinusoids of Vaswani et al. 2017: another model's positions"
        )


def _sinusoids(positions: int, width: int) -> np.ndarray:
    return np.asarray(sinusoidal(jnp.arange(positions)[None], width)[0])
