"""The optimizer and its learning-rate schedule, from Optax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm.config import OptimizerConfig
from lm.nn.params import Specs, map_specs

Array = jax.Array


def make_optimizer(cfg: OptimizerConfig, specs: Specs) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (Loshchilov & Hutter 2019), for a learning rate of 1.

    `apply_updates` brings the learning rate in, which depends on the budget as well as on the step.
    """
    rules = {"adamw": lambda: optax.scale_by_adam(b1=cfg.beta1, b2=cfg.beta2, eps=cfg.epsilon)}
    return optax.chain(
        optax.identity() if cfg.clip_norm is None else optax.clip_by_global_norm(cfg.clip_norm),
        rules[cfg.name](),
        optax.add_decayed_weights(cfg.weight_decay, mask=decay_mask(specs)),
    )


def decay_mask(specs: Specs) -> Any:
    """True for matrices and tables, False for norms and biases: every parameter is one or the other."""
    return map_specs(lambda spec: spec.inputs is not None, specs)


def learning_rate(cfg: OptimizerConfig, step: Array, progress: Array) -> Array:
    """Linear warmup, then a cosine to `final_learning_rate` (Loshchilov & Hutter 2017, arXiv:1608.03983).

    Args:
      step: updates done so far; update n of the warmup uses n / warmup_steps of the peak.
      progress: part of the budget after the warmup that is used up, 0 to 1 (see `Budget.progress`).
    """
    warmup = optax.linear_schedule(0.0, 1.0, max(cfg.warmup_steps, 1))(step + 1)
    decay = optax.cosine_decay_schedule(1.0, 1, alpha=cfg.final_learning_rate)(progress)
    return jnp.asarray(cfg.learning_rate * warmup * decay, jnp.float32)


def apply_updates(params: Any, updates: Any, rate: Array) -> Any:
    """params - rate · updates."""
    return jax.tree.map(lambda p, u: p - rate * u, params, updates)
