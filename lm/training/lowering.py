"""The training step before it is compiled: what a run, a plan and a measurement have in common."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from lm.config import RunConfig
from lm.parallel import constrainer
from lm.sharded_attention import attend_on
from lm.training.state import abstract_state
from lm.training.step import train_step


def lower_step(cfg: RunConfig, optimizer: optax.GradientTransformation, mesh: Mesh, batch: Any) -> jax.stages.Lowered:
    """`train_step` for a batch, or for the shapes of one with their shardings; the state is donated to it.

    Nothing is allocated: the state is known by its shapes.
    """
    attend = attend_on(cfg.model, mesh, length=cfg.data.context, training=True)
    step = functools.partial(train_step, cfg=cfg, optimizer=optimizer, constrain=constrainer(mesh), attend=attend)
    return jax.jit(step, donate_argnums=0).lower(abstract_state(cfg, optimizer, mesh), batch, np.float32(0))
