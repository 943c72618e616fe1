"""Checks of a config before anything runs: ranges, and all that fields demand of one another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from lm.config import (
    BUDGETS,
    MOST_TOKENS,
    DataConfig,
    InputError,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    SourceTokenizerConfig,
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
    _check_family(config)
    _check_rotary(config.model)
    _check_relative(config.model)
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
    "model.start_id",
    "training.label_smoothing",
}
_BELOW_ONE = {
    "model.dropout",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.momentum",
    "training.ema_decay",
    "training.label_smoothing",
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
    rows = {"context": data.context, **({"source_context": data.source_length} if model.has_encoder else {})}
    for name, length in rows.items():
        if model.positions == "learned" and model.max_positions is not None and model.max_positions < length:
            raise InputError(
                f"model.max_positions {model.max_positions} is less than data.{name} {length}: "
                "every position of a row needs its own"
            )


def _check_family(config: RunConfig) -> None:
    """What only an encoder's family reads, and what it can't."""
    model, data = config.model, config.data
    if not model.has_encoder:
        for name, default in _OF_PAIRS.items():
            section, _, field = name.partition(".")
            value = getattr(getattr(config, section), field)
            if value != default:
                raise InputError(
                    f"{name} is {value!r}, but a model of family {model.family!r} has no encoder: leave it at "
                    f"{default!r}, or set model.family to 'encoder_decoder'"
                )
        return
    if data.packing == "split":
        raise InputError(
            "data.packing is 'split', which cuts a text at row ends, and a pair stays whole: set it to 'best_fit', "
            "which packs pairs into rows, or 'padded', a row each"
        )
    if data.prompt_loss:
        raise InputError(
            "data.prompt_loss is True, but an encoder_decoder's prompts are what its encoder reads, and none of it is "
            "predicted: set it to False"
        )
    if data.max_length_ratio is not None and data.max_length_ratio < 1:
        raise InputError(
            f"data.max_length_ratio is {data.max_length_ratio}, and a pair's longer side has at least 1 times the "
            "tokens of the other: set it to 1 or more, or to None"
        )
    for field in ("window", "stride"):
        if getattr(config.evaluation, field) is not None:
            raise InputError(
                f"evaluation.{field} is {getattr(config.evaluation, field)}, but pairs are scored whole, in rows of "
                "data.source_context and data.context: set it to None"
            )
    own = config.source_tokenizer
    if model.share_embeddings and own.kind != "shared":
        raise InputError(
            f"source_tokenizer.kind is {own.kind!r}, but model.share_embeddings is True, and one table has one "
            "vocabulary: set it to False, or the kind to 'shared'"
        )
    if model.share_embeddings and model.source_vocab_size is not None:
        raise InputError(
            f"model.source_vocab_size is {model.source_vocab_size}, but model.share_embeddings is True, and one table "
            "has one vocabulary: set it to False, or leave the size at None"
        )
    if (own.kind == "file") != (own.path is not None):
        raise InputError(
            f"source_tokenizer.kind is {own.kind!r} and source_tokenizer.path is {own.path!r}: "
            "kind 'file' needs a path, and only it has one"
        )
    _check_vocabulary("source_tokenizer", own.kind, own.vocab_size)


_OF_PAIRS: dict[str, Any] = {
    f"{section}.{field.name}": field.default
    for section, of, names in (
        ("model", ModelConfig, ("encoder_layers", "share_embeddings", "source_vocab_size", "start_id")),
        ("data", DataConfig, ("source_context", "long_pairs", "max_length_ratio")),
        ("source_tokenizer", SourceTokenizerConfig, ("kind", "path", "vocab_size")),
    )
    for field in dataclasses.fields(of)
    if field.name in names
}


def _check_relative(model: ModelConfig) -> None:
    for name in ("relative_buckets", "relative_max_distance"):
        value, default = getattr(model, name), getattr(_MODEL, name)
        if value != default and model.positions != "relative":
            raise InputError(
                f"model.{name} is {value}, but model.positions is {model.positions!r}: leave it at {default}, or set "
                "model.positions to 'relative'"
            )
    if model.positions != "relative":
        return
    if model.relative_buckets < 4:
        raise InputError(
            f"model.relative_buckets is {model.relative_buckets}: it must be at least 4, for both directions, near "
            "and far"
        )
    if model.relative_max_distance <= model.relative_buckets // 2:
        raise InputError(
            f"model.relative_max_distance {model.relative_max_distance} is not more than the "
            f"{model.relative_buckets // 2} distances that half of model.relative_buckets {model.relative_buckets} "
            "have one each: set more distance, or fewer buckets"
        )


_MODEL = ModelConfig()


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
    "newton_schulz": ("name", ("muon",)),
    "newton_schulz_steps": ("name", ("muon",)),
    "newton_schulz_dtype": ("name", ("muon",)),
    "muon_by_head": ("name", ("muon",)),
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
    if config.evaluation.task is None and config.evaluation.task_every_steps is not None:
        raise InputError(
            f"evaluation.task_every_steps is {config.evaluation.task_every_steps}, but evaluation.task is None: set it "
            "to 'translation' or 'summarization', or task_every_steps to None"
        )
    if config.evaluation.task is None and config.evaluation.best == "task":
        raise InputError(
            "evaluation.best is 'task', but evaluation.task is None: set it to 'translation' or 'summarization', or "
            "best to 'nats'"
        )
    if config.evaluation.best == "task" and config.evaluation.task_every_steps is None:
        raise InputError(
            "evaluation.best is 'task', but evaluation.task_every_steps is None, so nothing would be chosen by it: set "
            "it to a number of steps, or best to 'nats'"
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
    _check_vocabulary("tokenizer", tokenizer.kind, tokenizer.vocab_size)


def _check_vocabulary(section: str, kind: str, size: int) -> None:
    if kind == "bpe" and not 258 <= size < MOST_TOKENS:
        raise InputError(
            f"{section}.vocab_size is {size}: a byte-level BPE needs at least 258 (256 bytes, BOS and EOS), and has "
            f"fewer than {MOST_TOKENS:,}"
        )
