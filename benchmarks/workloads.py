"""What is trained in a measurement: shapes of model and batch, the same for every side."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from lm.config import DataConfig, InputError, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig
from lm.fields import nearest

POOL = 16
"""Different batches that a side goes round in."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """A GPT-2 shape (pre-norm, GELU, learned positions, tied head, no biases) and its batch; sizes in tokens."""

    layers: int
    heads: int
    width: int
    context: int
    vocabulary: int
    batch_size: int

    @property
    def tokens(self) -> int:
        """In a batch."""
        return self.batch_size * self.context

    def config(self) -> RunConfig:
        """The run that trains it here: AdamW, clipping at 1, no dropout."""
        return RunConfig(
            model=ModelConfig(num_layers=self.layers, num_heads=self.heads, d_model=self.width),
            data=DataConfig(context=self.context),
            optimizer=OptimizerConfig(clip_norm=1.0),
            training=TrainingConfig(batch_size=self.batch_size),
        ).resolve(self.vocabulary)


WORKLOADS = {
    "W1": Workload(layers=4, heads=4, width=128, context=64, vocabulary=65, batch_size=12),  # nanoGPT's on a CPU
    "W2": Workload(layers=6, heads=6, width=384, context=256, vocabulary=65, batch_size=8),  # its on a GPU, fewer rows
    "W3": Workload(layers=12, heads=12, width=768, context=512, vocabulary=50304, batch_size=2),  # GPT-2 small
}


def workload(name: str, also: tuple[str, ...] = ()) -> Workload:
    """By its name. Raises InputError where there is none; `also` are other names that the command knows."""
    if name not in WORKLOADS:
        known = (*WORKLOADS, *also)
        raise InputError(f"--workloads: no {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    return WORKLOADS[name]


def random_rows(workload: dict[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of tokens_BT and targets_BT, int64, uniformly random: what every side trains on."""
    shape = (workload["batch_size"], workload["context"] + 1)
    random = np.random.default_rng(0)
    rows = [random.integers(0, workload["vocabulary"], shape) for _ in range(POOL)]
    return [(ids[:, :-1].copy(), ids[:, 1:].copy()) for ids in rows]
