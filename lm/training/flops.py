"""The FLOPs of a model, and the peak of a device, for model FLOP utilisation."""

from __future__ import annotations

import jax

from lm.config import ModelConfig
from lm.costs import accelerators
from lm.nn.decoder import NAME as CROSS_ATTENTION
from lm.nn.language_model import model_specs
from lm.nn.params import matrix_size


def flops_per_token(cfg: ModelConfig, context: int, source_context: int | None = None) -> float:
    """6 N + 12 N_heads H Σ T_l of a training step (PaLM, arXiv:2204.02311, appendix B), summed over the layers.

    N counts the matrices of the layers and the head, not the tables that are only looked up; a tied head counts once.
    T_l is the context, or the layer's window if that is shorter; such attention is counted in full, though causality
    masks half of it. With an encoder, tokens are those of targets: what a row of `source_context` tokens (None:
    `context`) takes, in the encoder and in the keys and values made of it, is shared out over a row of targets.
    """
    return _products(cfg, context, source_context) + attention_flops_per_token(cfg, context, source_context)


def attention_flops_per_token(cfg: ModelConfig, context: int, source_context: int | None = None) -> float:
    """The part of `flops_per_token` that is products of queries, keys, probabilities and values."""
    own = _keys(cfg, context)
    if cfg.has_encoder:
        sources = context if source_context is None else source_context
        own += cfg.num_layers * sources + _keys(cfg.encoder, sources) * sources / context
    return 12.0 * cfg.num_heads * cfg.head_width * own


def recomputed_flops_per_token(cfg: ModelConfig, context: int, source_context: int | None = None) -> float:
    """What remat adds: the forward pass of the layers once more, a third of what they take."""
    if not cfg.remat:
        return 0.0
    head = 6.0 * cfg.padded_vocabulary * cfg.d_model
    return (flops_per_token(cfg, context, source_context) - head) / 3


def _products(cfg: ModelConfig, context: int, source_context: int | None) -> float:
    """6 N."""
    specs = model_specs(cfg)
    matrices: float = matrix_size(specs)
    if cfg.has_encoder:
        of_sources = matrix_size(specs["encoder"]) + matrix_size({"kv": specs["layers"][CROSS_ATTENTION]["kv"]})
        sources = context if source_context is None else source_context
        matrices += of_sources * (sources / context - 1)
    if cfg.tie_embeddings:
        matrices += cfg.padded_vocabulary * cfg.d_model
    return 6.0 * matrices


def _keys(cfg: ModelConfig, context: int) -> float:
    """Keys that a token's queries meet in self-attention, summed over a stack's layers."""
    kinds = cfg.layer_pattern
    windows = [kinds[layer % len(kinds)].window for layer in range(cfg.num_layers)]
    return sum(context if window is None else min(window, context) for window in windows)


def peak_flops(device: jax.Device) -> float | None:
    """Peak FLOP/s of a device in bfloat16, None where it is not known."""
    return accelerators.peak_flops(device.device_kind)
