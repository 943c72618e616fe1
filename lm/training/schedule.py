"""The learning rate as a function of the step and of how much of the budget is used up."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from lm.config import OptimizerConfig

Array = jax.Array


def learning_rate(cfg: OptimizerConfig, step: Array, progress: Array) -> Array:
    """Linear warmup to the peak, then the decay that `schedule` names, float32.

    Args:
      step: updates done so far; update n of the warmup uses n / warmup_steps of the peak.
      progress: part of the budget after the warmup that is used up, 0 to 1 (see `Budget.progress`).
    """
    warmup = optax.linear_schedule(0.0, 1.0, max(cfg.warmup_steps, 1))(step + 1)
    return jnp.asarray(cfg.learning_rate * warmup * _decay(cfg, step, progress), jnp.float32)


def _decay(cfg: OptimizerConfig, step: Array, progress: Array) -> Array | float:
    """The factor on the peak after the warmup.

    cosine (Loshchilov & Hutter 2017, arXiv:1608.03983), linear and wsd end at `final_learning_rate`; wsd, warmup -
    stable - decay (Hu et al. 2024, arXiv:2404.06395), stays at the peak until the last `decay_fraction` of the budget
    and goes down linearly in it. inverse_sqrt falls as sqrt(warmup_steps / n) at update n (Vaswani et al. 2017,
    section 5.3) and, as constant, knows no end.
    """
    if cfg.schedule == "cosine":
        return optax.cosine_decay_schedule(1.0, 1, alpha=cfg.final_learning_rate)(progress)
    if cfg.schedule == "inverse_sqrt":
        warmup = max(cfg.warmup_steps, 1)
        return jnp.sqrt(warmup / jnp.maximum(step + 1, warmup).astype(jnp.float32))
    if cfg.schedule == "constant":
        return 1.0
    fraction = cfg.decay_fraction if cfg.schedule == "wsd" else 1.0
    gone = jnp.clip((progress - (1.0 - fraction)) / fraction, 0.0, 1.0)
    return 1.0 - (1.0 - cfg.final_learning_rate) * gone
