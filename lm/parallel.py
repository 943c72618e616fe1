"""Where arrays live: the device mesh, and the rules from logical axis names to mesh axes.

`lm/nn` names the axes of its parameters and activations and knows no mesh; this file maps the names.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lm.config import InputError, ParallelConfig
from lm.fields import nearest
from lm.nn.language_model import unconstrained
from lm.nn.layers import Constrain
from lm.nn.params import ParamSpec, Specs, map_specs

Array = jax.Array
Rules = Mapping[str, tuple[str, ...]]
"""Logical axis -> the mesh axes that split it, the outermost first."""
MESH_AXES = ("data", "fsdp", "tensor")
"""The outermost first: neighbours on the last one exchange the most. `sequence` belongs before `tensor`, `expert`
before `sequence`."""

# Every name that a parameter or an activation uses is here; () is replication, written out.
RULES: Rules = {
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
    "kv": (),
    "buckets": (),
    "mlp": ("tensor",),
    "norm": (),
}
FIXED = {
    "batch": "every device of data x fsdp computes its own rows",
    "layers": "the parameters of a layer are gathered while it runs, those of a stack never",
}
"""Names whose rule isn't a choice, and why."""
TOGETHER = (
    ("batch", "length", "width"),
    ("batch", "length", "kv_heads", "qkv"),
    ("batch", "length", "kv_heads", "kv"),
    ("batch", "length", "heads", "head"),
    ("batch", "length", "mlp"),
    ("batch", "length", "vocab"),
)
"""The axes of the activations, array by array; those of parameters are in their declarations."""

# The config field that sets the size of a logical axis.
SIZES = {
    "embed": "model.d_model",
    "vocab": "model.vocab_multiple",
    "heads": "model.num_heads",
    "kv_heads": "model.num_kv_heads",
    "mlp": "model.d_ff",
}


def rules_of(cfg: ParallelConfig) -> Rules:
    """The built-in rules, with those of `parallel.rules` in their places. Raises InputError for one that can't be."""
    changed: dict[str, tuple[str, ...]] = {}
    for text in cfg.rules:
        name, equals, joined = text.partition("=")
        axes = tuple(joined.split("+")) if joined else ()
        if not equals:
            raise InputError(f"parallel.rules has {text!r}: write NAME=AXIS, NAME=AXIS+AXIS, or NAME= to split nothing")
        if name not in RULES:
            raise InputError(
                f"parallel.rules names {name!r}, which is no axis of an array here{nearest(name, RULES)}: "
                f"they are {', '.join(RULES)}"
            )
        if name in FIXED:
            raise InputError(f"parallel.rules changes {name!r}, but {FIXED[name]}: leave it out")
        if name in changed:
            raise InputError(f"parallel.rules names {name!r} twice: keep one")
        for axis in axes:
            if axis not in MESH_AXES:
                raise InputError(
                    f"parallel.rules has {text!r}, but the mesh has no axis {axis!r}{nearest(axis, MESH_AXES)}: "
                    f"its axes are {', '.join(MESH_AXES)}"
                )
            if axes.count(axis) > 1:
                raise InputError(f"parallel.rules has {text!r}, which names {axis!r} twice: keep one")
        changed[name] = axes
    rules = {**RULES, **changed}
    for axes in TOGETHER if changed else ():
        _check_used_once(axes, rules)
    return rules


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
    used = _in_order(devices)[: data * inner]
    if idle := {device.process_index for device in devices} - {device.process_index for device in used}:
        raise InputError(
            f"parallel.data {cfg.data} x fsdp {cfg.fsdp} x tensor {cfg.tensor} takes {len(used)} of {len(devices)} "
            f"devices and leaves none to {len(idle)} processes, {min(idle)} the first: start fewer, or leave "
            "parallel.data out"
        )
    grid = _grid(used, (data, cfg.fsdp, cfg.tensor))
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def sharding(mesh: Mesh, shape: tuple[int, ...], axes: tuple[str, ...], rules: Rules = RULES) -> NamedSharding:
    """The sharding of one array. Raises InputError where a mesh axis doesn't divide the dimension it splits, or would
    split two dimensions."""
    assert len(shape) == len(axes), f"{len(shape)} dimensions, {len(axes)} axis names: {shape}, {axes}"
    _check_used_once(axes, rules)
    split = []
    for size, name in zip(shape, axes, strict=True):
        mesh_axes = rules[name]
        parts = math.prod(mesh.shape[axis] for axis in mesh_axes)
        if size % parts:
            raise InputError(
                f"axis {name!r} of size {size} is not a multiple of the {parts} devices on mesh axis "
                f"{'*'.join(mesh_axes)!r}: change parallel.{mesh_axes[-1]} or {SIZES.get(name, 'the size')}"
            )
        split.append(mesh_axes or None)
    return NamedSharding(mesh, PartitionSpec(*split))


def parameter_shardings(mesh: Mesh, specs: Specs, rules: Rules = RULES) -> Any:
    """The tree of shardings of a model's parameters."""

    def of(spec: ParamSpec) -> NamedSharding:
        return sharding(mesh, spec.shape, spec.axes, rules)

    return map_specs(of, specs)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def constrainer(mesh: Mesh, rules: Rules = RULES) -> Constrain:
    """`constrain(x, axes) -> x` for this mesh: places an activation by the logical names of its axes."""
    if mesh.size == 1:
        return unconstrained

    def constrain(x: Array, axes: tuple[str, ...]) -> Array:
        return jax.lax.with_sharding_constraint(x, sharding(mesh, x.shape, axes, rules))

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
    """The rows of a global batch that this process has to read: from the first to the last that its devices hold.

    They are its devices' own and no others wherever the mesh is in the order of processes, as it is but on some tori.
    """
    places = _row_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    slices = [place[0].indices(rows) for place in places if place is not None]
    return slice(min(one[0] for one in slices), max(one[1] for one in slices))


def put_rows(mesh: Mesh, rows: Any) -> Any:
    """Puts a tree of host arrays [B, ...] on the mesh, split by rows: of a global batch this process's `own_rows`."""
    rows_split = _row_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(rows, rows_split)  # the same in half the time
    parts = batch_shards(mesh)
    own = own_rows(mesh, parts)

    def put(x: np.ndarray) -> Array:
        part = len(x) // (own.stop - own.start)
        first = own.start * part

        def of_device(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(parts * part)
            return x[start - first : stop - first]

        shape = (parts * part, *x.shape[1:])
        places = rows_split.addressable_devices_indices_map(shape)
        # device by device: a transfer that `make_array_from_callback` makes is a hidden one to JAX's guard
        arrays = [jax.device_put(of_device(index), device) for device, index in places.items() if index is not None]
        return jax.make_array_from_single_device_arrays(shape, rows_split, arrays)

    return jax.tree.map(put, rows)


def _in_order(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """Neighbours first: the devices of a process together, and the processes of a slice of a TPU pod."""
    return sorted(devices, key=lambda device: (_slice(device), device.process_index, device.id))


def _grid(devices: Sequence[jax.Device], shape: tuple[int, int, int]) -> np.ndarray:
    """The devices, in order, as data × fsdp × tensor: the last axis runs within a process, or over nearest neighbours.

    A TPU's slice is a torus, which `jax.make_mesh` lays the axes out on; slices, between which the network is slow,
    follow one another along `data`.
    """
    slices = [list(group) for _, group in itertools.groupby(devices, _slice)]
    data, *inner = shape
    regular = len({len(each) for each in slices}) == 1 and data % len(slices) == 0
    if devices[0].platform != "tpu" or not regular:
        return np.array(devices).reshape(shape)
    each_shape = (data // len(slices), *inner)
    types = (AxisType.Auto,) * len(MESH_AXES)
    return np.concatenate([jax.make_mesh(each_shape, MESH_AXES, types, devices=each).devices for each in slices])


def _slice(device: jax.Device) -> int:
    """Of a TPU pod; 0 of what has none."""
    return getattr(device, "slice_index", None) or 0


def _check_used_once(axes: tuple[str, ...], rules: Rules) -> None:
    used: dict[str, str] = {}
    for name in axes:
        for axis in rules[name]:
            if axis in used:
                raise InputError(
                    f"mesh axis {axis!r} would split an array of axes {axes} twice, by the rules "
                    f"{used[axis]!r}={'+'.join(rules[used[axis]])} and {name!r}={'+'.join(rules[name])}: "
                    "change one in parallel.rules"
                )
            used[axis] = name


def _row_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))
