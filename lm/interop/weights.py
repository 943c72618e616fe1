"""Tensors of someone else's model and our parameters: which part of which is which, read and written one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lm.config import InputError, ModelConfig
from lm.interop.safetensors_files import Tensor
from lm.nn.language_model import model_specs
from lm.nn.params import is_spec
from lm.parallel import RULES, Rules, sharding
from lm.run_directory import listed

ALL: Any = ...
"""The index of a whole array."""
_PIECE = 1 << 22
"""Numbers looked at together."""


class Weight(NamedTuple):
    """A tensor of theirs, and where it lies in ours: at `path`, in a stack over layers at `layer`.

    Once `transposed` (theirs has outputs before inputs), each piece of it, (place in theirs, place in ours), has the
    same numbers in the same order on both sides; only the shape may differ.
    """

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    layer: int | None = None
    transposed: bool = False
    pieces: tuple[tuple[Any, Any], ...] = ((ALL, ALL),)

    def put(self, theirs: np.ndarray, ours: np.ndarray) -> None:
        """Writes the tensor into its places in our parameter."""
        theirs = theirs.T if self.transposed else theirs
        ours = ours if self.layer is None else ours[self.layer]
        for source, target in self.pieces:
            ours[target] = theirs[source].reshape(ours[target].shape)

    def take(self, params: Mapping[str, Any]) -> np.ndarray:
        """The tensor, put together from our parameters."""
        leaf: Any = params
        for name in self.path:
            leaf = leaf[name]
        ours = np.asarray(leaf if self.layer is None else leaf[self.layer])
        theirs = np.empty(self.shape[::-1] if self.transposed else self.shape, ours.dtype)
        for target, source in self.pieces:
            theirs[target] = ours[source].reshape(theirs[target].shape)
        return theirs.T if self.transposed else theirs


def query_key_value(cfg: ModelConfig) -> tuple[Any, Any, Any]:
    """The places of queries, keys and values in our `qkv`, [..., K, (G + 2) H]."""
    keys = cfg.num_heads // cfg.kv_heads * cfg.head_width
    values = keys + cfg.head_width
    return np.s_[..., :keys], np.s_[..., keys:values], np.s_[..., values:]


def fused(cfg: ModelConfig) -> tuple[tuple[Any, Any], ...]:
    """The pieces of a matrix or bias that has all queries, then all keys, then all values."""
    queries, keys = cfg.num_heads * cfg.head_width, cfg.kv_heads * cfg.head_width
    theirs = np.s_[..., :queries], np.s_[..., queries : queries + keys], np.s_[..., queries + keys :]
    return tuple(zip(theirs, query_key_value(cfg), strict=True))


def check(weights: Sequence[Weight], tensors: Mapping[str, Tensor], where: Path) -> None:
    """Raises InputError, before anything is read, for tensors that are missing, unknown or of another shape."""
    wanted = {weight.name for weight in weights}
    if missing := [weight.name for weight in weights if weight.name not in tensors]:
        raise InputError(
            f"{where} lacks {len(missing)} of the {len(wanted)} tensors that its config asks for: {listed(missing)}"
        )
    if unknown := sorted(set(tensors) - wanted):
        raise InputError(f"{where} has {len(unknown)} tensors that its config has no place for: {listed(unknown)}")
    for weight in weights:
        found = tensors[weight.name]
        if found.shape != weight.shape:
            raise InputError(
                f"{found.path}: {weight.name} has shape {list(found.shape)}, by the config it must be "
                f"{list(weight.shape)}"
            )


def read(
    cfg: ModelConfig,
    weights: Sequence[Weight],
    tensors: Mapping[str, Tensor],
    *,
    dtype: str,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
) -> dict[str, Any]:
    """Our parameters, read from files. Raises InputError at a number that is not finite."""

    def tensor(weight: Weight) -> np.ndarray:
        theirs = tensors[weight.name].read(weight.name)
        _check_finite(theirs, weight.name, tensors[weight.name].path)
        return theirs

    return assemble(cfg, weights, tensor, dtype=dtype, mesh=mesh, rules=rules)


def assemble(
    cfg: ModelConfig,
    weights: Sequence[Weight],
    tensor: Callable[[Weight], np.ndarray],
    *,
    dtype: str,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
) -> dict[str, Any]:
    """Our parameters, put together from their tensors; rows of padding are 0.

    On this process's first device; on a mesh if there is one, laid out by the rules: then a host's memory
    holds at any time one whole parameter, and one tensor. Else it holds also the parameters so far.
    """
    by_path: dict[tuple[str, ...], list[Weight]] = {}
    for weight in weights:
        by_path.setdefault(weight.path, []).append(weight)

    def parameter(path: tuple[Any, ...], spec: Any) -> jax.Array:
        ours = _aligned_zeros(spec.shape, dtype)
        for weight in by_path.pop(tuple(key.key for key in path)):
            weight.put(tensor(weight), ours)
        if mesh is None:
            return jax.device_put(ours, jax.local_devices()[0], may_alias=True)
        place = sharding(mesh, spec.shape, spec.axes, rules)
        return jax.make_array_from_callback(spec.shape, place, lambda index: ours[index])

    params = jax.tree_util.tree_map_with_path(parameter, model_specs(cfg), is_leaf=is_spec)
    assert not by_path, list(by_path)
    return params


def _aligned_zeros(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """At an address that XLA's CPU back end takes as it is, without a copy: a multiple of 64 bytes."""
    wanted = jnp.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * wanted.itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(wanted).reshape(shape)


def _check_finite(array: np.ndarray, name: str, path: Path) -> None:
    flat = array.reshape(-1)
    for at in range(0, flat.size, _PIECE):
        piece = flat[at : at + _PIECE].astype(np.float32, copy=False)
        if not np.isfinite(piece).all():
            number = int(np.flatnonzero(~np.isfinite(piece))[0])
            raise InputError(
                f"{path}: {name} holds {piece[number]} (number {at + number} of {flat.size}): the weights are damaged"
            )
