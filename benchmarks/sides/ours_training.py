"""This project's training step, fed as a run feeds it: the next batch on the device before the step, the numbers of the
step before read while it runs.

SPEC: {"task": "training", "config": a resolved run config as JSON text, "workload": {...}, "packed": whether rows hold
several documents}
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from benchmarks.serving import Side
from benchmarks.workloads import random_rows
from lm import allocator
from lm.config import RunConfig
from lm.data.pipeline import Batch
from lm.nn.language_model import model_specs
from lm.nn.params import count
from lm.parallel import make_mesh, put_rows
from lm.training.flops import flops_per_token, peak_flops
from lm.training.lowering import lower_step, optimizer_on
from lm.training.state import create_state


def build(spec: dict[str, Any]) -> Side:
    cfg = RunConfig.from_json(spec["config"])
    mesh = make_mesh(cfg.parallel, jax.devices()[:1])
    optimizer = optimizer_on(cfg, mesh)
    batches = [batch_of(*pair, packed=spec["packed"]) for pair in random_rows(spec["workload"])]
    state = create_state(cfg, optimizer, mesh)  # in the order of a run
    compiled = lower_step(cfg, optimizer, mesh, put_rows(mesh, batches[0])).compile()
    allocator.give_back()

    def run(steps: int) -> None:
        nonlocal state
        held, batch = None, put_rows(mesh, batches[0])
        for step in range(steps):
            ahead = put_rows(mesh, batches[(step + 1) % len(batches)])
            state, sums = compiled(state, batch, np.float32(0))
            jax.device_get(held)
            held, batch = sums, ahead
        jax.block_until_ready(state)

    device = mesh.devices.flat[0]
    facts = {
        "parameters": count(model_specs(cfg.model)),
        "flops_per_token": flops_per_token(cfg.model, cfg.data.context),
        "device": device.device_kind,
        "peak_flops": peak_flops(device),
    }
    return Side(run, facts, lambda: (device.memory_stats() or {}).get("peak_bytes_in_use"))


def batch_of(tokens_BT: np.ndarray, targets_BT: np.ndarray, *, packed: bool) -> Batch:
    """A batch as the pipeline makes them: of one document a row, or of about eight."""
    B, T = tokens_BT.shape
    begins_BT = np.zeros((B, T), bool)
    if packed:
        begins_BT = np.random.default_rng(1).random((B, T)) < 8 / T
    begins_BT[:, 0] = True
    places_BT = np.broadcast_to(np.arange(T), (B, T))
    first_BT = np.maximum.accumulate(np.where(begins_BT, places_BT, 0), axis=1)
    return Batch(
        tokens_BT=tokens_BT.astype(np.int32),
        targets_BT=targets_BT.astype(np.int32),
        weights_BT=np.ones((B, T), np.float32),
        segments_BT=np.cumsum(begins_BT, axis=1).astype(np.int32),
        positions_BT=(places_BT - first_BT).astype(np.int32),
    )
