"""The FLOPs of a model, and the peak of a device, for model FLOP utilisation."""

from __future__ import annotations

import jax

from lm.config import ModelConfig
from lm.costs import accelerators
from lm.nn.language_model import model_specs
from lm.nn.params import matrix_size


def flops_per_token(cfg: ModelConfig, context: int) -> float:
    """6 N + 12 N_heads H Σ T_l of a training step (PaLM, arXiv:2204.02311, appendix B), summed over the layers.

    N counts the matrices of the layers and the head, not the tables that are only looked up; a tied head counts once.
    T_l is the context, or the layer's window if that is shorter; such attention is counted in full, though causality
    masks half of it.
    """
    matrices = matrix_size(model_specs(cfg))
    if cfg.tie_embeddings:
        matrices += cfg.padded_vocabulary * cfg.d_model
    kinds = cfg.layer_pattern
    windows = [kinds[layer % len(kinds)].window for layer in range(cfg.num_layers)]
    keys = sum(context if window is None else min(window, context) for window in windows)
    return 6.0 * matrices + 12.0 * cfg.num_heads * cfg.head_width * keys


def recomputed_flops_per_token(cfg: ModelConfig, context: int) -> float:
    """What remat adds: the forward pass of the layers once more, a third of what they take."""
    if not cfg.remat:
        return 0.0
    head = 6.0 * cfg.padded_vocabulary * cfg.d_model
    return (flops_per_token(cfg, context) - head) / 3


def peak_flops(device: jax.Device) -> float | None:
    """Peak FLOP/s of a device in bfloat16, None where it is not known."""
    return accelerators.peak_flops(device.device_kind)
