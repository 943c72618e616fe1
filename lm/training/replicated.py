"""The classic data-parallel route: `jax.pmap` runs `train_step` on every device, with the whole state and its own rows.

The devices of all processes stand on one named axis, over which the sums of a step are summed before they are divided.
The arrays are global ones: the state is everywhere the same and has no axis of devices, so that a checkpoint and an
evaluation see what they see on the other route.

Shapes: B rows of the global batch, P devices of all processes, b = B / P rows of each, T position.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding

from lm.config import InputError, ParallelConfig, RunConfig
from lm.data.pipeline import Batch
from lm.nn.attention_backend import BACKENDS
from lm.nn.language_model import unconstrained
from lm.parallel import batch_shards, own_rows, put_rows, replicated
from lm.sharded_attention import choice
from lm.training.state import TrainState, abstract_state
from lm.training.step import Sums, train_step

Array = jax.Array

AXIS = "data"


def check_devices(cfg: ParallelConfig, mesh: Mesh, devices: int) -> None:
    """Raises InputError where the mesh leaves out some of all `devices`: pmap takes whole processes."""
    if cfg.strategy == "pmap" and mesh.size != devices:
        raise InputError(
            f"parallel.strategy is 'pmap', which takes all {devices} devices, but parallel.data is {cfg.data}: "
            "leave it at None, or set parallel.strategy to 'spmd'"
        )


def lower_replicated(
    cfg: RunConfig, optimizer: optax.GradientTransformationExtraArgs, mesh: Mesh, batch: Any
) -> jax.stages.Lowered:
    """`lm.training.lowering.lower_step` of this route.

    Args:
      optimizer: made with no mesh.
      batch: the global one, [B, T], or its shapes; the compiled step takes it as `put_replicas` places it.
    """
    length, source_length = cfg.data.context, cfg.data.source_length
    attend = BACKENDS[choice(cfg.model, mesh, length=length, training=True, source_length=source_length).name]

    def step(state: TrainState, batch_bT: Batch, progress: Array) -> tuple[TrainState, Sums]:
        return train_step(
            state,
            batch_bT,
            progress,
            cfg=cfg,
            optimizer=optimizer,
            constrain=unconstrained,
            attend=attend,
            total=lambda sums: lax.psum(sums, AXIS),
            first_row=lax.axis_index(AXIS) * batch_bT.tokens_BT.shape[0],
        )

    each = jax.pmap(
        step,
        AXIS,
        in_axes=(None, 0, None),
        out_axes=None,
        donate_argnums=0,
        axis_size=mesh.size,
        devices=tuple(mesh.devices.flat),  # in the mesh's order: a device gets the rows that it has on the other route
    )
    parts = batch_shards(mesh)
    batch_PbT = jax.tree.map(lambda x: jax.ShapeDtypeStruct((parts, x.shape[0] // parts, *x.shape[1:]), x.dtype), batch)
    shapes = (abstract_state(cfg, optimizer, mesh), batch_PbT, jax.ShapeDtypeStruct((), np.float32))
    # Shapes and dtypes alone: pmap would take arrays, with several processes, for one process's part.
    return each.lower(*jax.tree.map(lambda x: jax.typeof(jax.ShapeDtypeStruct(x.shape, x.dtype)), shapes))


def put_replicas(mesh: Mesh, rows: Any) -> Any:
    """`put_rows` of this route: a tree of host arrays [B, ...], of which this process has its own, as [P, b, ...]."""
    own = own_rows(mesh, batch_shards(mesh))
    parts = own.stop - own.start
    return put_rows(mesh, jax.tree.map(lambda x: x.reshape(parts, len(x) // parts, *x.shape[1:]), rows))


def on_mesh(tree: Any, mesh: Mesh) -> Any:
    """A tree of arrays of either route as arrays on the run's mesh, which are the same buffers: nothing is copied.

    pmap's are on a mesh of its own, of one axis over the same devices.
    """
    everywhere = replicated(mesh)

    def put(x: Array) -> Array:
        if not isinstance(x.sharding, NamedSharding) or x.sharding.mesh == mesh:  # the former: on one device
            return x
        assert x.is_fully_replicated, x.sharding
        parts = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, everywhere, parts)

    return jax.tree.map(put, tree)
