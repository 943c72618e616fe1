"""How a parameter is declared: once, beside the function that reads it.

A model's parameters are a nested dict of arrays; its declaration is the same dict of `ParamSpec`. Shardings, counts,
weight-decay masks and FLOP counts are all read off the declaration.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
Initializer = Callable[[Array, tuple[int, ...]], Array]


class ParamSpec(NamedTuple):
    """One parameter. `shape` and `axes` (logical names, see `lm/parallel.py`) go together.

    `inputs` is how many leading axes (after "layers") a matrix is contracted over: w_DF has 1, w_NHD has 2, a table
    indexed by its first axis 1. None for what only scales or shifts (norms, biases). `pieces` are the widths along the
    last axis of the matrices that one array holds side by side; () where it holds one.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Initializer
    inputs: int | None = None
    pieces: tuple[int, ...] = ()


Specs = Mapping[str, Any]  # a nested dict whose leaves are ParamSpec


def is_spec(node: object) -> bool:
    """For `jax.tree.map(..., is_leaf=is_spec)`: a NamedTuple would otherwise be taken apart."""
    return isinstance(node, ParamSpec)


def map_specs(function: Callable[[ParamSpec], Any], specs: Specs) -> Any:
    """The tree of `function(spec)`."""
    return jax.tree.map(function, specs, is_leaf=is_spec)


def initialize(specs: Specs, key: Array) -> dict[str, Any]:
    """Float32 parameters. Each is drawn with its own key, folded from its path, not from its place among the others."""

    def draw(path: tuple[Any, ...], spec: ParamSpec) -> Array:
        return spec.init(jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode())), spec.shape)

    return jax.tree_util.tree_map_with_path(draw, specs if is_spec(specs) else dict(specs), is_leaf=is_spec)


def stack(specs: Specs, layers: int) -> Any:
    """The same specs with a leading axis "layers"; each layer is drawn with its own key."""

    def stacked(spec: ParamSpec) -> ParamSpec:
        def init(key: Array, shape: tuple[int, ...]) -> Array:
            return jax.vmap(lambda k: spec.init(k, shape[1:]))(jax.random.split(key, shape[0]))

        return spec._replace(shape=(layers, *spec.shape), axes=("layers", *spec.axes), init=init)

    return map_specs(stacked, specs)


def count(specs: Specs) -> int:
    """Number of parameters."""
    return sum(_size(spec) for spec in jax.tree.leaves(specs, is_leaf=is_spec))


def matrix_size(specs: Specs) -> int:
    """Parameters that take part in matrix products: all matrices but tables that are only looked up."""
    leaves = jax.tree.leaves(specs, is_leaf=is_spec)
    return sum(_size(s) for s in leaves if s.inputs is not None and s.axes[0] not in ("vocab", "positions"))


def normal(std: float) -> Initializer:
    return lambda key, shape: std * jax.random.normal(key, shape, jnp.float32)


def uniform(bound: float) -> Initializer:
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def zeros(key: Array, shape: tuple[int, ...]) -> Array:
    return jnp.zeros(shape, jnp.float32)


def ones(key: Array, shape: tuple[int, ...]) -> Array:
    return jnp.ones(shape, jnp.float32)


def _size(spec: ParamSpec) -> int:
    size = 1
    for length in spec.shape:
        size *= length
    return size
