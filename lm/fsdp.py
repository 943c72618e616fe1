"""Loss and gradient with explicit exchange: each device computes its own rows, and parameters are whole only in use.

Fully sharded data parallelism (ZeRO stage 3, Rajbhandari et al. 2020, arXiv:1910.02054; Zhao et al. 2023,
arXiv:2304.11277): a device holds its part of every parameter, gathers a layer when it comes to it, forward and again
backward, and is left with the sum over devices of its part of the gradient. XLA could insert the exchange by itself,
but on CPUs it would reduce whole gradients, and no back end promises to gather in the compute dtype.

The program is manual (`jax.shard_map`) over the mesh axes that the batch is split over; `tensor` stays to the compiler.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from lm.nn.encoder import Gather
from lm.nn.layers import Constrain
from lm.nn.params import ParamSpec, Specs, is_spec, map_specs
from lm.parallel import RULES, Rules, batch_shards, constrainer, sharding

Array = jax.Array
Function = Callable[..., Any]


class Exchange(NamedTuple):
    """What `train_step` is handed of a mesh.

    constrain: places an activation. gather: makes parameters whole where they are used. total: sums (objective, nats,
    tokens, gradients) over devices. spread: makes a function of (params, batch, keys), which returns those four, one of
    the devices' own parts and rows. manual: mesh axes that aren't the compiler's inside of `spread`.
    """

    constrain: Constrain
    gather: Gather | None = None
    total: Function | None = None
    spread: Callable[[Function], Function] | None = None
    manual: frozenset[str] = frozenset()


def exchange(mesh: Mesh, specs: Specs, *, dtype: str, rules: Rules = RULES) -> Exchange:
    """The exchange of a mesh, for a model's declaration; nothing where the batch is not split.

    Args:
      dtype: of gathered matrices and tables: what products read them in.
    """
    if batch_shards(mesh) == 1:
        return Exchange(constrainer(mesh, rules))
    wide = frozenset(axis for axis in mesh.axis_names if mesh.shape[axis] > 1)
    automatic = wide.difference(RULES["batch"])
    manual = frozenset(mesh.axis_names) - automatic
    by_hand, by_compiler = _among(rules, wide & manual), _among(rules, automatic)

    def part(spec: ParamSpec) -> _Part:
        splits = tuple((at, by_hand[name]) for at, name in enumerate(spec.axes) if by_hand[name])
        gathered = {name for _, names in splits for name in names}
        others = tuple(name for name in by_hand["batch"] if name not in gathered)
        place = sharding(mesh, spec.shape, spec.axes, by_compiler).spec
        compilers = frozenset(axis for name in spec.axes for axis in by_compiler[name])
        return _Part(splits, others, place, compilers, dtype if spec.inputs is not None else None)

    def constrain(x: Array, axes: tuple[str, ...]) -> Array:
        return lax.with_sharding_constraint(x, sharding(mesh, x.shape, axes, by_compiler).spec) if automatic else x

    def gather(params: Any, declared: Specs) -> Any:
        return jax.tree.map(lambda spec, x: _whole(x, part(spec)), declared, params, is_leaf=is_spec)

    def total(sums: tuple[Array, Array, Array, Any]) -> tuple[Array, Array, Array, Any]:
        *scalars, gradients = sums
        objective, nats, tokens = lax.psum(scalars, RULES["batch"])
        return objective, nats, tokens, jax.tree.map(_summed, map_specs(part, specs), gradients, is_leaf=_is_part)

    def spread(function: Function) -> Function:
        rows, alone = PartitionSpec(RULES["batch"]), PartitionSpec()
        places = map_specs(lambda spec: sharding(mesh, spec.shape, spec.axes, by_hand).spec, specs)
        return jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(places, rows, rows),
            out_specs=(alone, alone, alone, places),
            axis_names=manual,
            check_vma=False,  # a sum over devices inside of a custom gradient is not seen in the types
        )

    split = any(part(spec).splits for spec in jax.tree.leaves(specs, is_leaf=is_spec))
    return Exchange(constrain, gather if split else None, total, spread, manual)


class _Part(NamedTuple):
    """How a device holds a parameter."""

    splits: tuple[tuple[int, tuple[str, ...]], ...]  # (dimension, mesh axes), of the manual axes
    others: tuple[str, ...]  # mesh axes along which devices hold the same part, from their own rows
    place: PartitionSpec  # over the compiler's axes
    compilers: frozenset[str]  # those of them that split it
    dtype: str | None  # that it is gathered in; None: its own


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _whole(x: Array, part: _Part) -> Array:
    """The whole parameter, as its dtype rounds it, from a device's part; its gradient is summed and scattered.

    The result has the parameter's own dtype again, which XLA leaves out before a product in `part.dtype`: so the
    gradient is float32 from the product to the end of its sum over devices, no rounding between (FSDP in PyTorch and
    torchtitan sum in float32 too, from gradients in the compute dtype).
    """
    return _gathered(x, part)


def _gathered(x: Array, part: _Part) -> Array:
    if not part.splits:
        return x

    def gathered(x: Array) -> Array:
        own = x.dtype
        x = x if part.dtype is None else x.astype(part.dtype)
        for at, names in part.splits:
            x = lax.all_gather(x, names, axis=at, tiled=True)
        return x.astype(own)

    return _locally(gathered, part)(x)


def _whole_backward(part: _Part, _: None, gradient: Array) -> tuple[Array]:
    def scattered(g: Array) -> Array:
        for at, names in reversed(part.splits):
            g = lax.psum_scatter(g, names, scatter_dimension=at, tiled=True)
        return g

    return (_locally(scattered, part)(gradient) if part.splits else gradient,)


# not `_whole` itself: what a layer keeps is decided by the primitives, and a custom gradient's call is one of them
_whole.defvjp(lambda x, part: (_gathered(x, part), None), _whole_backward)


def _summed(part: _Part, gradient: Array) -> Array:
    """The sum of a gradient over the devices that hold the same part."""
    if not part.others:
        return gradient
    return _locally(lambda g: lax.psum(g, part.others), part)(gradient)


def _locally(function: Function, part: _Part) -> Function:
    """Manual over the remaining axes too: the compiler would gather over them whatever is exchanged over others."""
    if not part.compilers:
        return function
    place = part.place
    return jax.shard_map(function, in_specs=place, out_specs=place, axis_names=part.compilers, check_vma=False)


def _is_part(node: object) -> bool:
    return isinstance(node, _Part)


def _among(rules: Rules, axes: frozenset[str]) -> Rules:
    """The same over some mesh axes alone."""
    return {name: tuple(axis for axis in split if axis in axes) for name, split in rules.items()}
