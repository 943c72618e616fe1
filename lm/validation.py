"""Checks of a config before anything runs: ranges, and all that fields demand of one another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from lm.config import (
    BUDGETS,
    DataConfig,
    InputError,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from lm.differences import flat
from lm.fields import check_types
from lm.nn.attention_backend import refusal


def validate(config: RunConfig) -> RunConfig:
    """Checks types, ranges and fields against one another; returns the config itself.

    Raises InputError, naming the fields, their values and the way out. What depends on the devices or on the text is
    checked where those are known, still before anything compiles.
    """
    check_types(config)
    _check_ranges(config)
    _check_model(config.model, config.data)
    _check_rotary(config.model)
    _check_training(config.training)
    _check_parallel(config.parallel)
    _check_optimizer(config.optimizer, config.model.tie_embeddings)
    _check_evaluation(config)
    _check_tokenizer(config)
    return config


_AT_LEAST_ZERO = {
    "model.dropout",
    "training.seed",
    "optimizer.warmup_steps",
    "optimizer.final_learning_rate",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.weight_decay",
    "optimizer.momentum",
    "optimizer.embedding_factor",
    "optimizer.head_factor",
    "optimizer.vector_factor",
    "training.max_skipped_steps",
    "model.init_std",
}
_BELOW_ONE = {
    "model.dropout",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.momentum",
    "training.ema_decay",
}


def _check_ranges(config: RunConfig) -> None:
    for name, value in _entries(flat(config)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if name in _AT_LEAST_ZERO:
            if not 0 <= value < float("inf"):
                raise InputError(f"{name} is {value}: it must be 0 or more")
        elif not 0 < value < float("inf"):
            raise InputError(f"{name} is {value}: it must be more than 0 and finite")
        if name in _BELOW_ONE and value >= 1:
            raise InputError(f"{name} is {value}: it must be less than 1")


def _entries(fields: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The fields, of one with several values each of them."""
    for name, value in fields.items():
        if isinstance(value, tuple):
            yield from ((f"{name}[{index}]", one) for index, one in enumerate(value))
        else:
            yield name, value


def _check_model(model: ModelConfig, data: DataConfig) -> None:
    if model.head_dim is None and model.d_model % model.num_heads:
        raise InputError(
            f"model.num_heads {model.num_heads} does not divide model.d_model {model.d_model}: "
            "change one, or set model.head_dim"
        )
    if model.num_heads % model.kv_heads:
        raise InputError(f"model.num_kv_heads {model.kv_heads} does not divide model.num_heads {model.num_heads}")
    problem = None if model.attention == "auto" else refusal(model.attention, model, dropout=model.dropout > 0)
    if problem is not None:
        raise InputError(f"model.attention is {model.attention!r}, but {problem}")
    if model.norm_offset and model.norm != "rmsnorm":
        raise InputError(f"model.norm_offset belongs to rmsnorm, but model.norm is {model.norm!r}: set it to False")
    if model.window == ():
        raise InputError("model.window is empty: give the windows that repeat over the layers, or None")
    if model.positions == "sinusoidal" and model.d_model % 2:
        raise InputError(f"sinusoidal positions come in pairs, but model.d_model is {model.d_model}: use an even width")
    if model.positions == "learned" and model.max_positions is not None and model.max_positions < data.context:
        raise InputError(
            f"model.max_positions {model.max_positions} is less than data.context {data.context}: "
            "every position of a row needs its own"
        )


def _check_rotary(model: ModelConfig) -> None:
    for name, default in _ROTARY.items():
        value = getattr(model, name)
        if value == ():
            raise InputError(f"model.{name} is empty: give the values that repeat over the layers, or one")
        if value == default:
            continue
        if model.positions != "rotary":
            raise InputError(
                f"model.{name} is {value!r}, but model.positions is {model.positions!r}: leave it at {default!r}, or "
                "set model.positions to 'rotary'"
            )
        if name.startswith(_LLAMA3) and model.rotary_scaling != "llama3":
            raise InputError(
                f"model.{name} is {value!r}, but model.rotary_scaling is {model.rotary_scaling!r}: leave it at "
                f"{default!r}, or set model.rotary_scaling to 'llama3'"
            )
    if model.positions == "rotary" and model.head_width % 2:
        raise InputError(
            f"rotary positions turn pairs, but a head is {model.head_width} wide: use an even model.head_dim"
        )
    low, high = model.rotary_low_frequency_factor, model.rotary_high_frequency_factor
    if low >= high:
        raise InputError(
            f"model.rotary_low_frequency_factor {low} is not less than model.rotary_high_frequency_factor {high}: "
            "long wavelengths, of low frequency, are the stretched ones"
        )
    if model.rotary_scaling == "llama3" and model.rotary_factor == _ROTARY["rotary_factor"]:
        raise InputError("model.rotary_scaling 'llama3' with model.rotary_factor 1.0 stretches nothing: set the factor")


_ROTARY = {f.name: f.default for f in dataclasses.fields(ModelConfig) if f.name.startswith("rotary_")}
_LLAMA3 = ("rotary_low_", "rotary_high_", "rotary_original_")


def _check_training(training: TrainingConfig) -> None:
    given = [f"{name} {getattr(training, name)}" for name in BUDGETS if getattr(training, name) is not None]
    if len(given) != 1:
        raise InputError(
            "exactly one of training.steps, .tokens, .epochs and .seconds must be set, not "
            f"{' and '.join(given) or 'none'}: set the others to None"
        )
    if training.seed >= 2**32:
        raise InputError(f"training.seed is {training.seed}: it must be less than 2**32")
    if training.batch_size % training.gradient_accumulation:
        raise InputError(
            f"training.gradient_accumulation {training.gradient_accumulation} does not divide "
            f"training.batch_size {training.batch_size}"
        )


def _check_parallel(parallel: ParallelConfig) -> None:
    if parallel.strategy != "pmap":
        return
    if parallel.rules:
        raise InputError(
            f"parallel.strategy is 'pmap', which splits no array, but parallel.rules is {parallel.rules}: "
            "leave them out, or set parallel.strategy to 'spmd'"
        )
    for name in ("fsdp", "tensor"):
        size = getattr(parallel, name)
        if size > 1:
            raise InputError(
                f"parallel.strategy is 'pmap', which keeps whole replicas, but parallel.{name} is {size}: "
                "set it to 1, or parallel.strategy to 'spmd'"
            )


def _check_optimizer(optimizer: OptimizerConfig, tied: bool) -> None:
    if tied and optimizer.head_factor != 1.0:
        raise InputError(
            f"optimizer.head_factor is {optimizer.head_factor}, but model.tie_embeddings is True: the head is the "
            "embedding table, so set optimizer.embedding_factor"
        )
    if optimizer.decay_fraction > 1:
        raise InputError(f"optimizer.decay_fraction is {optimizer.decay_fraction}: it must be at most 1, the whole")
    for field in dataclasses.fields(OptimizerConfig):
        readers = READERS.get(field.name)
        value = getattr(optimizer, field.name)
        if readers is None or value == field.default:
            continue
        chooser, names = readers
        chosen = getattr(optimizer, chooser)
        if chosen not in names:
            raise InputError(
                f"optimizer.{field.name} is {value!r}, but optimizer.{chooser} {chosen!r} doesn't read it: leave it at "
                f"{field.default!r}, or set optimizer.{chooser} to {' or '.join(map(repr, names))}"
            )


# Who reads a field: the field that chooses among them, and its values.
READERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "beta1": ("name", ("adamw", "muon", "lion", "sgd")),
    "beta2": ("name", ("adamw", "muon", "lion")),
    "epsilon": ("name", ("adamw", "muon")),
    "momentum": ("name", ("muon",)),
    "newton_schulz_steps": ("name", ("muon",)),
    "newton_schulz_dtype": ("name", ("muon",)),
    "final_learning_rate": ("schedule", ("cosine", "linear", "wsd")),
    "decay_fraction": ("schedule", ("wsd",)),
}


def _check_evaluation(config: RunConfig) -> None:
    window = config.evaluation.window or config.data.context
    stride = config.evaluation.stride or window
    if stride > window:
        raise InputError(
            f"evaluation.stride {stride} is more than evaluation.window {window}: "
            "tokens between windows would not be scored"
        )
    rows = config.model.max_positions or config.data.context
    if config.model.positions == "learned" and window > rows:
        raise InputError(
            f"evaluation.window {window} is more than the model's {rows} learned positions: use at most {rows}"
        )


def _check_tokenizer(config: RunConfig) -> None:
    tokenizer = config.tokenizer
    if (tokenizer.kind == "file") != (tokenizer.path is not None):
        raise InputError(
            f"tokenizer.kind is {tokenizer.kind!r} and tokenizer.path is {tokenizer.path!r}: "
            "kind 'file' needs a path, and only it has one"
        )
    for name in ("special_tokens", "byte_fallback"):
        if getattr(tokenizer, name) and tokenizer.kind != "bpe":
            raise InputError(f"tokenizer.{name} is of a BPE that is trained here: tokenizer.kind is {tokenizer.kind!r}")
    if tokenizer.kind == "bpe" and tokenizer.vocab_size < 258:
        raise InputError(
            f"tokenizer.vocab_size is {tokenizer.vocab_size}: "
            "a byte-level BPE needs at least 258 (256 bytes, BOS and EOS)"
        )
