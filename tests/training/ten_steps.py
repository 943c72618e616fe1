"""Ten training steps on a fixed packed batch stream: what the tests of step, mesh and golden numbers share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from lm.config import DataConfig, OptimizerConfig, RunConfig, TrainingConfig
from lm.data.packing import Batch
from lm.nn.language_model import model_specs
from lm.nn.source import Source
from lm.parallel import put_rows
from lm.training.lowering import lower_step, step_on
from lm.training.optimizer import make_optimizer
from lm.training.replicated import put_replicas
from lm.training.state import create_state

from ..conftest import PAIR_SHAPES, SHAPES, VOCABULARY

ROWS, CONTEXT, SOURCE_CONTEXT = 16, 24, 20


def run_config(name: str, *, gradient_accumulation: int = 1, **model) -> RunConfig:
    """A resolved config of one of the test shapes."""
    shape = SHAPES[name] if name in SHAPES else PAIR_SHAPES[name]
    return RunConfig(
        model=dataclasses.replace(shape, **model),
        data=DataConfig(context=CONTEXT, source_context=SOURCE_CONTEXT if shape.has_encoder else None),
        training=TrainingConfig(steps=10, batch_size=ROWS, gradient_accumulation=gradient_accumulation, seed=3),
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=2),
    ).resolve(VOCABULARY, shape.source_vocab_size)


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
    ids_and_places = [np.zeros((ROWS, CONTEXT), np.int32) for _ in range(4)]
    batch = Batch(*ids_and_places[:2], np.zeros((ROWS, CONTEXT), np.float32), *ids_and_places[2:])
    for row, (start, length) in enumerate(zip(starts.tolist(), rows.tolist(), strict=True)):
        segment, position = 1, 0
        for column in range(length):
            place = (start + column) % len(ids)
            ends = place in lasts
            target = 0 if ends else ids[place + 1]
            for array, value in zip(batch[:5], (ids[place], target, float(not ends), segment, position), strict=True):
                array[row, column] = value
            segment, position = (segment + 1, 0) if ends else (segment, position + 1)
    return batch


def pairs_at(step: int) -> Batch:
    """The same rows as the targets of sources, in rows of another length: of each piece up to 5 of its targets, the
    last one first."""
    batch = batch_at(step)
    source = Source(*(np.zeros((ROWS, SOURCE_CONTEXT), np.int32) for _ in range(3)))
    for row in range(ROWS):
        begin = 0
        for segment in range(1, batch.segments_BT[row].max() + 1):
            ids = batch.targets_BT[row][batch.segments_BT[row] == segment][:5][::-1][: SOURCE_CONTEXT - begin]
            for array, values in zip(source, (ids % 47, segment, np.arange(len(ids))), strict=True):
                array[row, begin : begin + len(ids)] = values
            begin += len(ids)
    return batch._replace(source=source)


def stream_of(cfg: RunConfig) -> Callable[[int], Batch]:
    """The batches that a model of this family takes."""
    return pairs_at if cfg.model.has_encoder else batch_at


def compiled(cfg: RunConfig, mesh):
    """The jitted step of a config on a mesh, which leaves the state that it is given, and a fresh state."""
    optimizer = make_optimizer(cfg.optimizer, model_specs(cfg.model), mesh)
    return jax.jit(step_on(cfg, optimizer, mesh)), create_state(cfg, optimizer, mesh)


def as_in_a_run(cfg: RunConfig, mesh):
    """The step as a run has it, by either strategy and with its state donated; how it wants its batches; a state."""
    pmap = cfg.parallel.strategy == "pmap"
    optimizer = make_optimizer(cfg.optimizer, model_specs(cfg.model), None if pmap else mesh)
    step = lower_step(cfg, optimizer, mesh, put_rows(mesh, stream_of(cfg)(0))).compile()
    return step, put_replicas if pmap else put_rows, create_state(cfg, optimizer, mesh)


def losses(cfg: RunConfig, mesh, with_state: bool = False):
    """The loss of each of ten updates, in nats a token; and the state after them."""
    step, put, state = as_in_a_run(cfg, mesh)
    found, state = ten_losses(step, state, mesh, put, stream_of(cfg))
    return (found, state) if with_state else found


def ten_losses(step, state, mesh, put=put_rows, stream=batch_at):
    """The loss of each of ten updates by a compiled step, and the state after them."""
    found = []
    for n in range(10):
        state, sums = step(state, put(mesh, stream(n)), np.float32(n / 10))
        found.append(float(sums.nats / sums.tokens))
    return found, state
