"""The training state: arrays only, born and restored in their places on the mesh."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.config import InputError, RunConfig
from lm.model import LM
from lm.nn.language_model import model_specs
from lm.nn.source import Source
from lm.parallel import parameter_shardings, replicated, rules_of

Array = jax.Array


class Skipped(NamedTuple):
    """Steps whose loss or gradients were not finite, int32: in the whole run, and the last ones in a row."""

    total: Array | np.int32
    in_a_row: Array | np.int32


class TrainState(NamedTuple):
    """step: int32, updates done, skipped ones included. params: float32 tree. opt_state: Optax's tree.

    ema: the moving average of params, None where `training.ema_decay` is.
    """

    step: Array
    params: Any
    opt_state: Any
    ema: Any = None
    skipped: Skipped = Skipped(np.int32(0), np.int32(0))

    @property
    def evaluated(self) -> Any:
        """The weights that a run is judged by, and that a reader of its checkpoint gets."""
        return self.params if self.ema is None else self.ema

    def items(self, seconds: Any) -> dict[str, Any]:
        """What a checkpoint holds of it: `params` are those evaluated, and `raw_params` those that training goes on
        from where they are others."""
        rest = {
            "step": self.step,
            "seconds": seconds,
            "skipped": self.skipped.total,
            "skipped_in_a_row": self.skipped.in_a_row,
        }
        items = {"params": self.evaluated, "opt_state": self.opt_state, "rest": rest}
        return items if self.ema is None else {**items, "raw_params": self.params}

    @classmethod
    def of_items(cls, items: dict[str, Any]) -> TrainState:
        """The inverse of `items`."""
        rest, averaged = items["rest"], "raw_params" in items
        return cls(
            rest["step"],
            items["raw_params" if averaged else "params"],
            items["opt_state"],
            items["params"] if averaged else None,
            Skipped(rest["skipped"], rest["skipped_in_a_row"]),
        )


def abstract_state(cfg: RunConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state's shapes, dtypes and shardings, with nothing allocated: what a checkpoint is restored onto."""
    shapes = jax.eval_shape(lambda: _draw(cfg, optimizer))
    params = parameter_shardings(mesh, model_specs(cfg.model), rules_of(cfg.parallel))
    shardings = TrainState(
        step=replicated(mesh),  # type: ignore[arg-type]
        params=params,
        opt_state=_shardings_of(shapes.opt_state, shapes.params, params, mesh),
        ema=None if shapes.ema is None else params,
        skipped=Skipped(replicated(mesh), replicated(mesh)),  # type: ignore[arg-type]
    )
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def create_state(cfg: RunConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A fresh state from `training.seed`, each device drawing only its own part."""
    # For once, on a CPU: compiled in a third of the time with fewer of LLVM's passes, as fast and the same to the bit.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    options: Any = {"xla_backend_optimization_level": 1} if on_cpu else None
    return lower_state(cfg, optimizer, mesh).compile(options)()


def lower_state(cfg: RunConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> jax.stages.Lowered:
    """The program that draws a fresh state."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(cfg, optimizer, mesh))
    return jax.jit(lambda: _draw(cfg, optimizer), out_shardings=shardings).lower()


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
        lambda given: _at_step_0(given, cfg, optimizer),
        out_shardings=shardings,
        donate_argnums=0,
    )
    return start(placed)


def _shardings_of(opt_state: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """An optimizer's arrays lie as the parameter that they belong to and have the shape of, or its shape without one
    axis (Adafactor's sums along it); all others are everywhere.

    The tree of an optimizer holds trees of the parameters, or of some of them: what a leaf belongs to is in its path.
    """
    places = {
        tuple(key.key for key in path): (leaf.shape, place)
        for (path, leaf), place in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(shardings), strict=True)
    }

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        found = (places.get(tuple(keys[start:])) for start in range(len(keys)))
        shape, where = next((each for each in found if each is not None), ((), replicated(mesh)))
        if leaf.shape == shape:
            return where
        for axis in range(len(shape)):
            if leaf.shape == shape[:axis] + shape[axis + 1 :]:
                return NamedSharding(mesh, PartitionSpec(*where.spec[:axis], *where.spec[axis + 1 :]))
        return replicated(mesh)

    return jax.tree.map_with_path(place, opt_state)


def _draw(cfg: RunConfig, optimizer: optax.GradientTransformation) -> TrainState:
    key = jax.random.fold_in(jax.random.key(cfg.training.seed), 0)  # 0: initialisation, 1: dropout
    model = dataclasses.replace(cfg.model, attention="reference")  # no parameter depends on it; kernels want long rows
    token = jnp.zeros((1, 1), jnp.int32)
    params = LM(model).init(key, token, source=Source(token, token, token) if model.has_encoder else None)["params"]
    return _at_step_0(params, cfg, optimizer)


def _at_step_0(params: Any, cfg: RunConfig, optimizer: optax.GradientTransformation) -> TrainState:
    ema = None if cfg.training.ema_decay is None else jax.tree.map(jnp.copy, params)
    none = jnp.zeros((), jnp.int32)
    return TrainState(none, params, optimizer.init(params), ema, Skipped(none, none))
