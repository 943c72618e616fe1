"""The training step, as a pure function.

Shapes: B rows of the global batch, T position, A micro-batches, b = B / A rows in each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm.config import ModelConfig, RunConfig
from lm.data.pipeline import Batch
from lm.nn import language_model
from lm.nn.layers import Constrain
from lm.training.optimizer import apply_updates, learning_rate
from lm.training.state import TrainState

Array = jax.Array


class Sums(NamedTuple):
    """What a step reports; all float32 scalars.

    nats: Σ weight · nll of the batch before the update. tokens: Σ weight. grad_norm: global norm before clipping.
    """

    nats: Array
    tokens: Array
    grad_norm: Array
    learning_rate: Array


def train_step(
    state: TrainState,
    batch: Batch,
    progress: Array,
    *,
    cfg: RunConfig,
    optimizer: optax.GradientTransformation,
    constrain: Constrain,
) -> tuple[TrainState, Sums]:
    """One update: the gradient of Σ nats / Σ tokens over the global batch.

    The sums are divided once, after accumulation and after the reduction over devices, so neither changes the update.
    """
    keys_B = _dropout_keys(cfg, state.step, batch.tokens_BT.shape[0])
    nats, gradients = _accumulate(state.params, batch, keys_B, cfg, constrain)
    tokens = jnp.sum(batch.weights_BT)
    gradients = jax.tree.map(lambda g: g / jnp.maximum(tokens, 1.0), gradients)
    rate = learning_rate(cfg.optimizer, state.step, progress)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    sums = Sums(nats, tokens, optax.tree.norm(gradients), rate)
    return TrainState(state.step + 1, apply_updates(state.params, updates, rate), opt_state), sums


def sum_nats(
    params: Any, batch: Batch, dropout_keys_B: Array | None, *, cfg: ModelConfig, constrain: Constrain
) -> Array:
    """Σ weight · nll over a batch, in nats."""
    nll_BT = language_model.nll(
        params,
        batch.tokens_BT,
        batch.targets_BT,
        batch.segments_BT,
        batch.positions_BT,
        cfg=cfg,
        dropout_keys_B=dropout_keys_B,
        constrain=constrain,
    )
    return jnp.sum(nll_BT * batch.weights_BT)


def _dropout_keys(cfg: RunConfig, step: Array, rows: int) -> Array | None:
    """One key a row of the global batch, from (seed, step, row): independent of devices and micro-batches."""
    if not cfg.model.dropout:
        return None
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(cfg.training.seed), 1), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))


def _accumulate(
    params: Any, batch: Batch, keys_B: Array | None, cfg: RunConfig, constrain: Constrain
) -> tuple[Array, Any]:
    """The sum of nats and its gradient, over `gradient_accumulation` micro-batches one after another."""

    def sums(batch_b: Batch, keys_b: Array | None) -> tuple[Array, Any]:
        return jax.value_and_grad(sum_nats)(params, batch_b, keys_b, cfg=cfg.model, constrain=constrain)

    micro_batches = cfg.training.gradient_accumulation
    if micro_batches == 1:
        return sums(batch, keys_B)

    def cut(x: Array) -> Array:
        # Micro-batch a takes rows a, a + A, ...: each device cuts its own rows and nothing moves.
        return x.reshape(x.shape[0] // micro_batches, micro_batches, *x.shape[1:]).swapaxes(0, 1)

    def add(total: tuple[Array, Any], micro: tuple[Batch, Array | None]) -> tuple[tuple[Array, Any], None]:
        return jax.tree.map(jnp.add, total, sums(*micro)), None

    zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, zero, jax.tree.map(cut, (batch, keys_B)))[0]
