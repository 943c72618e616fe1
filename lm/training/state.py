"""The training state: arrays only, born and restored in their places on the mesh."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lm.config import InputError, RunConfig
from lm.model import LM
from lm.nn.language_model import model_specs
from lm.parallel import parameter_shardings, replicated

Array = jax.Array


class TrainState(NamedTuple):
    """step: int32, updates done. params: float32 tree. opt_state: Optax's tree."""

    step: Array
    params: Any
    opt_state: Any


def abstract_state(cfg: RunConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state's shapes, dtypes and shardings, with nothing allocated: what a checkpoint is restored onto."""
    shapes = jax.eval_shape(lambda: _draw(cfg, optimizer))
    params = parameter_shardings(mesh, model_specs(cfg.model))
    shardings = TrainState(
        step=replicated(mesh),  # type: ignore[arg-type]
        params=params,
        opt_state=optax.tree.map_params(
            optimizer,
            lambda _, sharding: sharding,
            shapes.opt_state,
            params,
            transform_non_params=lambda _: replicated(mesh),
        ),
    )
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def create_state(cfg: RunConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A fresh state from `training.seed`, each device drawing only its own part."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(cfg, optimizer, mesh))
    return jax.jit(lambda: _draw(cfg, optimizer), out_shardings=shardings)()


def state_of(params: Any, cfg: RunConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A state at step 0 with given parameters. Raises InputError where they aren't those of the config's model."""
    abstract = abstract_state(cfg, optimizer, mesh)
    expected, found = (
        {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (abstract.params, params)
    )
    for name in expected.keys() | found.keys():
        shapes = [tree[name].shape if name in tree else None for tree in (expected, found)]
        if shapes[0] != shapes[1]:
            raise InputError(f"the weights to go on from have {name} of shape {shapes[1]}, the model needs {shapes[0]}")
    placed = jax.tree.map(lambda x, like: jax.device_put(x.astype(like.dtype), like.sharding), params, abstract.params)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    start = jax.jit(
        lambda given: TrainState(jnp.zeros((), jnp.int32), given, optimizer.init(given)),
        out_shardings=shardings,
        donate_argnums=0,
    )
    return start(placed)


def _draw(cfg: RunConfig, optimizer: optax.GradientTransformation) -> TrainState:
    key = jax.random.fold_in(jax.random.key(cfg.training.seed), 0)  # 0: initialisation, 1: dropout
    params = LM(cfg.model).init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
