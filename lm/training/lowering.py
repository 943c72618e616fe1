"""The training step before it is compiled: what a run, a plan and a measurement have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from lm.config import RunConfig
from lm.fsdp import exchange
from lm.nn.language_model import model_specs
from lm.nn.matmul import numerics
from lm.parallel import replicated, rules_of
from lm.sharded_attention import attend_on
from lm.training.optimizer import make_optimizer
from lm.training.replicated import lower_replicated
from lm.training.state import abstract_state
from lm.training.step import train_step


def optimizer_on(cfg: RunConfig, mesh: Mesh) -> optax.GradientTransformationExtraArgs:
    """The run's optimizer, for a state that lies on the mesh as `parallel.strategy` has it."""
    shared = mesh if cfg.parallel.strategy == "spmd" else None  # under pmap each device updates everything
    return make_optimizer(cfg.optimizer, model_specs(cfg.model), shared, rules_of(cfg.parallel))


def lower_step(
    cfg: RunConfig, optimizer: optax.GradientTransformationExtraArgs, mesh: Mesh, batch: Any
) -> jax.stages.Lowered:
    """`train_step` for a batch, or for the shapes of one with their shardings; the state is donated to it.

    Nothing is allocated: the state is known by its shapes.
    """
    if cfg.parallel.strategy == "pmap":
        return lower_replicated(cfg, optimizer, mesh, batch)
    state = abstract_state(cfg, optimizer, mesh)
    # Where it came from, or the compiler may put it elsewhere; the sums are everywhere.
    places = (jax.tree.map(lambda x: x.sharding, state), replicated(mesh)) if mesh.size > 1 else None
    step = jax.jit(step_on(cfg, optimizer, mesh), donate_argnums=0, out_shardings=places)
    return step.lower(state, batch, np.float32(0))


def step_on(cfg: RunConfig, optimizer: optax.GradientTransformationExtraArgs, mesh: Mesh) -> Callable[..., Any]:
    """`train_step` as a function of (state, batch, progress) on this mesh."""
    rules = rules_of(cfg.parallel)
    given = exchange(mesh, model_specs(cfg.model), dtype=numerics(cfg.model.compute_dtype).dtype, rules=rules)
    attend = attend_on(
        cfg.model,
        mesh,
        length=cfg.data.context,
        training=True,
        source_length=cfg.data.source_length,
        manual=given.manual,
        rules=rules,
    )
    return functools.partial(
        train_step,
        cfg=cfg,
        optimizer=optimizer,
        constrain=given.constrain,
        attend=attend,
        total=given.total,
        gather=given.gather,
        spread=given.spread,
    )
