"""Where arrays live: the device mesh, and the rules from logical axis names to mesh axes.

`lm/nn` names the axes of its parameters and activations and knows no mesh; this file maps the names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lm.config import InputError, ParallelConfig
from lm.nn.language_model import unconstrained
from lm.nn.layers import Constrain
from lm.nn.params import ParamSpec, Specs, map_specs

Array = jax.Array
MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. Every name that a parameter or an activation uses is here; () is replication, written out.
RULES: Mapping[str, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp"),
    "length": (),
    "width": (),
    # parameters, and the activations made of heads, hidden units and logits
    "layers": (),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "positions": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head": (),
    "qkv": (),
    "mlp": ("tensor",),
    "norm": (),
}

# The config field that sets the size of a logical axis.
SIZES = {
    "embed": "model.d_model",
    "vocab": "model.vocab_multiple",
    "heads": "model.num_heads",
    "kv_heads": "model.num_kv_heads",
    "mlp": "model.d_ff",
}


def make_mesh(cfg: ParallelConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of axes data × fsdp × tensor over the devices (default: all). Raises InputError where they don't fit."""
    devices = list(jax.devices() if devices is None else devices)
    inner = cfg.fsdp * cfg.tensor
    data = cfg.data or len(devices) // inner
    if data * inner == 0 or data * inner > len(devices) or (cfg.data is None and len(devices) % inner):
        raise InputError(
            f"parallel.data {cfg.data} x fsdp {cfg.fsdp} x tensor {cfg.tensor} does not fit {len(devices)} device(s): "
            "choose sizes whose product divides the number of devices"
        )
    grid = np.array(devices[: data * inner]).reshape(data, cfg.fsdp, cfg.tensor)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def sharding(mesh: Mesh, shape: tuple[int, ...], axes: tuple[str, ...]) -> NamedSharding:
    """The sharding of one array. Raises InputError where a mesh axis doesn't divide the dimension it splits."""
    assert len(shape) == len(axes), f"{len(shape)} dimensions, {len(axes)} axis names: {shape}, {axes}"
    split = []
    for size, name in zip(shape, axes, strict=True):
        mesh_axes = RULES[name]
        parts = math.prod(mesh.shape[axis] for axis in mesh_axes)
        if size % parts:
            raise InputError(
                f"axis {name!r} of size {size} is not a multiple of the {parts} devices on mesh axis "
                f"{'*'.join(mesh_axes)!r}: change parallel.{mesh_axes[-1]} or {SIZES.get(name, 'the size')}"
            )
        split.append(mesh_axes or None)
    used = [axis for mesh_axes in split if mesh_axes for axis in mesh_axes]
    assert len(used) == len(set(used)), f"a mesh axis is used twice for axes {axes}"
    return NamedSharding(mesh, PartitionSpec(*split))


def parameter_shardings(mesh: Mesh, specs: Specs) -> Any:
    """The tree of shardings of a model's parameters."""

    def of(spec: ParamSpec) -> NamedSharding:
        return sharding(mesh, spec.shape, spec.axes)

    return map_specs(of, specs)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def constrainer(mesh: Mesh) -> Constrain:
    """`constrain(x, axes) -> x` for this mesh: places an activation by the logical names of its axes."""
    if mesh.size == 1:
        return unconstrained

    def constrain(x: Array, axes: tuple[str, ...]) -> Array:
        return jax.lax.with_sharding_constraint(x, sharding(mesh, x.shape, axes))

    return constrain


def batch_shards(mesh: Mesh) -> int:
    """Parts that the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def check_batch(rows: int, micro_batches: int, mesh: Mesh) -> None:
    """Raises InputError unless every device gets the same number of rows of every micro-batch."""
    parts = batch_shards(mesh) * micro_batches
    if rows % parts:
        lower, upper = rows // parts * parts, -(-rows // parts) * parts
        micro = f" x {micro_batches} micro-batches" if micro_batches > 1 else ""
        raise InputError(
            f"training.batch_size {rows} is not a multiple of the {batch_shards(mesh)} devices on mesh axes "
            f"data x fsdp{micro}: use {f'{lower} or ' if lower else ''}{upper}"
        )


def own_rows(mesh: Mesh, rows: int) -> slice:
    """The rows of a global batch that the devices of this process hold: those it has to read."""
    places = _row_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    slices = [place[0].indices(rows) for place in places if place is not None]
    start, stop = min(one[0] for one in slices), max(one[1] for one in slices)
    covered = {row for begin, end, _ in slices for row in range(begin, end)}
    assert len(covered) == stop - start, "the rows of a process lie apart: the mesh's devices are not in host order"
    return slice(start, stop)


def put_rows(mesh: Mesh, rows: Any) -> Any:
    """Puts a tree of host arrays [B, ...] on the mesh, split by rows: of a global batch this process's `own_rows`."""
    rows_split = _row_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(rows, rows_split)  # the same in half the time
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows_split, x), rows)


def _row_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))
