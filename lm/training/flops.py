"""Model FLOPs and the peak of known accelerators, for model FLOP utilisation."""

from __future__ import annotations

import jax

from lm.config import ModelConfig
from lm.nn.language_model import model_specs
from lm.nn.params import matrix_size

# Dense bfloat16 peak, FLOP/s a device, from the makers' data sheets; the first kind contained in device_kind counts.
PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "TPU v6 lite": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
}


def flops_per_token(cfg: ModelConfig, context: int) -> float:
    """6 N + 12 L N_heads H T of a training step (PaLM, arXiv:2204.02311, appendix B).

    N counts the matrices of the layers and the head, not the tables that are only looked up; a tied head counts once.
    Attention is counted in full, though half of it is masked.
    """
    matrices = matrix_size(model_specs(cfg))
    if cfg.tie_embeddings:
        matrices += cfg.padded_vocabulary * cfg.d_model
    return 6.0 * matrices + 12.0 * cfg.num_layers * cfg.num_heads * cfg.head_width * context


def peak_flops(device: jax.Device) -> float | None:
    """Peak FLOP/s of a device in bfloat16, None where it is not known."""
    return next((peak for kind, peak in PEAKS.items() if kind in device.device_kind), None)
