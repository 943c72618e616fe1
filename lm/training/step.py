"""The training step, as a pure function.

Shapes: B rows of the global batch, T position, A micro-batches, b = B / A rows in each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm.config import ModelConfig, RunConfig
from lm.data.pipeline import Batch
from lm.nn import language_model
from lm.nn.attention import Attend
from lm.nn.encoder import Gather
from lm.nn.late import written
from lm.nn.layers import Constrain
from lm.training.optimizer import apply_updates
from lm.training.schedule import learning_rate
from lm.training.state import Skipped, TrainState

Array = jax.Array


class Sums(NamedTuple):
    """What a step reports; scalars, float32 but for the counts.

    objective: what the gradients are of, as `lm.nn.chunked_nll.head_loss` has it. nats: Σ weight · nll of the batch
    before the update. tokens: Σ weight. grad_norm: global norm before clipping. skipped: as in the state after it.
    """

    objective: Array
    nats: Array
    tokens: Array
    grad_norm: Array
    learning_rate: Array
    skipped: Skipped


def train_step(
    state: TrainState,
    batch: Batch,
    progress: Array,
    *,
    cfg: RunConfig,
    optimizer: optax.GradientTransformationExtraArgs,
    constrain: Constrain,
    attend: Attend | None = None,
    total: Callable[[Any], Any] | None = None,
    first_row: Array | int = 0,
    gather: Gather | None = None,
    spread: Callable[[Callable], Callable] | None = None,
) -> tuple[TrainState, Sums]:
    """One update: the gradient of Σ objective / Σ tokens over the global batch.

    The sums are divided once, after accumulation and after the reduction over devices, so neither changes the update.
    A step whose loss or gradients are not finite changes nothing but the counts.

    Args:
      total: sums (objective, nats, tokens, gradients) over the devices that each hold some rows. None: this one holds
        all of them.
      first_row: which row of the global batch is the first of `batch`.
      gather: makes parameters whole that are split over devices. None: they are.
      spread: makes of the function of (params, batch, dropout keys) that returns those four one that each device
        computes of its own rows. None: it is, or the compiler splits it.
    """

    def sums_of(params: Any, batch: Batch, keys_B: Array | None) -> tuple[Array, Array, Array, Any]:
        (objective, nats), gradients = _accumulate(params, batch, keys_B, cfg, constrain, attend, gather)
        sums = objective, nats, jnp.sum(batch.weights_BT), gradients
        return sums if total is None else total(sums)

    keys_B = _dropout_keys(cfg, state.step, first_row, batch.tokens_BT.shape[0])
    summed = sums_of if spread is None else spread(sums_of)
    objective, nats, tokens, gradients = summed(state.params, batch, keys_B)
    count = jnp.maximum(tokens, 1.0)
    norm = optax.tree.norm(gradients) / count
    finite = jnp.isfinite(norm) & jnp.isfinite(objective)  # the norm is not where any gradient is not
    rate = learning_rate(cfg.optimizer, state.step, progress)
    updates, opt_state = optimizer.update(
        gradients, state.opt_state, state.params, count=count, norm=norm, finite=finite
    )
    params = apply_updates(state.params, updates, rate)
    params = jax.tree.map(lambda new, old: jnp.where(finite, new, old), params, state.params)
    ema = None if state.ema is None else _average(state.ema, params, cfg.training.ema_decay, state.step, finite)
    skipped = Skipped(state.skipped.total + ~finite, jnp.where(finite, 0, state.skipped.in_a_row + 1))
    sums = Sums(objective, nats, tokens, norm, rate, skipped)
    return TrainState(state.step + 1, params, opt_state, ema, skipped), sums


def batch_loss(
    params: Any,
    batch: Batch,
    dropout_keys_B: Array | None,
    *,
    cfg: ModelConfig,
    z_loss: float | None,
    constrain: Constrain,
    attend: Attend | None = None,
    gather: Gather | None = None,
    label_smoothing: float | None = None,
) -> tuple[Array, Array]:
    """(objective, nats) of a batch, summed over its tokens by their weights."""
    return language_model.loss(
        params,
        batch.tokens_BT,
        batch.targets_BT,
        batch.weights_BT,
        batch.segments_BT,
        batch.positions_BT,
        cfg=cfg,
        z_loss=z_loss,
        dropout_keys_B=dropout_keys_B,
        constrain=constrain,
        attend=attend,
        gather=gather,
        source=batch.source,
        label_smoothing=label_smoothing,
    )


def _average(ema: Any, params: Any, decay: float | None, step: Array, finite: Array) -> Any:
    """ema + (1 - d) (params - ema), with d = min(decay, (1 + step) / (10 + step)): what is drawn at the start is soon
    forgotten (as TensorFlow's ExponentialMovingAverage has it)."""
    assert decay is not None
    gain = jnp.where(finite, 1.0 - jnp.minimum(decay, (1.0 + step) / (10.0 + step)), 0.0)
    params = written(params)  # the new ones: the old ones would be copied to be read
    return jax.tree.map(lambda e, p: e + gain * (p - e), ema, params)


def _dropout_keys(cfg: RunConfig, step: Array, first_row: Array | int, rows: int) -> Array | None:
    """One key a row of the global batch, from (seed, step, row): independent of devices and micro-batches."""
    if not cfg.model.dropout:
        return None
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(cfg.training.seed), 1), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, first_row + jnp.arange(rows))


def _accumulate(
    params: Any,
    batch: Batch,
    keys_B: Array | None,
    cfg: RunConfig,
    constrain: Constrain,
    attend: Attend | None,
    gather: Gather | None,
) -> tuple[tuple[Array, Array], Any]:
    """(objective, nats) and the objective's gradient, over `gradient_accumulation` micro-batches one after another."""
    loss = functools.partial(
        batch_loss,
        cfg=cfg.model,
        z_loss=cfg.training.z_loss,
        label_smoothing=cfg.training.label_smoothing,
        constrain=constrain,
        attend=attend,
        gather=gather,
    )

    def sums(batch_b: Batch, keys_b: Array | None) -> tuple[tuple[Array, Array], Any]:
        return jax.value_and_grad(loss, has_aux=True)(params, batch_b, keys_b)

    micro_batches = cfg.training.gradient_accumulation
    if micro_batches == 1:
        return sums(batch, keys_B)

    def cut(x: Array) -> Array:
        # Micro-batch a takes rows a, a + A, ...: each device cuts its own rows and nothing moves.
        return x.reshape(x.shape[0] // micro_batches, micro_batches, *x.shape[1:]).swapaxes(0, 1)

    def add(total: tuple[tuple[Array, Array], Any], micro: tuple[Batch, Array | None]) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, total, sums(*micro)), None

    nothing = jnp.zeros((), jnp.float32)
    zero = ((nothing, nothing), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, zero, jax.tree.map(cut, (batch, keys_B)))[0]
