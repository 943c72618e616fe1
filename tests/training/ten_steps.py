"""Ten training steps on a fixed packed batch stream: what the tests of step, mesh and golden numbers share."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from lm.config import DataConfig, OptimizerConfig, RunConfig, TrainingConfig
from lm.data.packing import Batch
from lm.nn.language_model import model_specs
from lm.parallel import put_rows
from lm.training.lowering import lower_step, step_on
from lm.training.optimizer import make_optimizer
from lm.training.replicated import put_replicas
from lm.training.state import create_state

from ..conftest import SHAPES, VOCABULARY

ROWS, CONTEXT = 16, 24


def run_config(name: str, *, gradient_accumulation: int = 1, **model) -> RunConfig:
    """A resolved config of one of the test shapes."""
    return RunConfig(
        model=dataclasses.replace(SHAPES[name], **model),
        data=DataConfig(context=CONTEXT),
        training=TrainingConfig(steps=10, batch_size=ROWS, gradient_accumulation=gradient_accumulation, seed=3),
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=2),
    ).resolve(VOCABULARY)


def batch_at(step: int) -> Batch:
    """Packed rows: several documents in most, one cut short and one mostly padding."""
    draw = np.random.default_rng(step)
    lengths = draw.integers(1, 40, 30)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.cumsum(draw.integers(0, 3, offsets[-1])) % VOCABULARY  # one of three next ids: something to learn
    starts = draw.integers(0, offsets[-1], ROWS)
    rows = np.full(ROWS, CONTEXT)
    rows[3], rows[8] = 17, 2
    lasts = set((offsets[1:] - 1).tolist())
    batch = Batch(
        *(np.zeros((ROWS, CONTEXT), np.float32 if name == "weights_BT" else np.int32) for name in Batch._fields)
    )
    for row, (start, length) in enumerate(zip(starts.tolist(), rows.tolist(), strict=True)):
        segment, position = 1, 0
        for column in range(length):
            place = (start + column) % len(ids)
            ends = place in lasts
            target = 0 if ends else ids[place + 1]
            for array, value in zip(batch, (ids[place], target, float(not ends), segment, position), strict=True):
                array[row, column] = value
            segment, position = (segment + 1, 0) if ends else (segment, position + 1)
    return batch


def compiled(cfg: RunConfig, mesh):
    """The jitted step of a config on a mesh, which leaves the state that it is given, and a fresh state."""
    optimizer = make_optimizer(cfg.optimizer, model_specs(cfg.model), mesh)
    return jax.jit(step_on(cfg, optimizer, mesh)), create_state(cfg, optimizer, mesh)


def as_in_a_run(cfg: RunConfig, mesh):
    """The step as a run has it, by either strategy and with its state donated; how it wants its batches; a state."""
    pmap = cfg.parallel.strategy == "pmap"
    optimizer = make_optimizer(cfg.optimizer, model_specs(cfg.model), None if pmap else mesh)
    step = lower_step(cfg, optimizer, mesh, put_rows(mesh, batch_at(0))).compile()
    return step, put_replicas if pmap else put_rows, create_state(cfg, optimizer, mesh)


def losses(cfg: RunConfig, mesh, with_state: bool = False):
    """The loss of each of ten updates, in nats a token; and the state after them."""
    step, put, state = as_in_a_run(cfg, mesh)
    found, state = ten_losses(step, state, mesh, put)
    return (found, state) if with_state else found


def ten_losses(step, state, mesh, put=put_rows):
    """The loss of each of ten updates by a compiled step, and the state after them."""
    found = []
    for n in range(10):
        state, sums = step(state, put(mesh, batch_at(n)), np.float32(n / 10))
        found.append(float(sums.nats / sums.tokens))
    return found, state
