"""The attention back end of a mesh: chosen by its devices, and run on each of them over its own rows and heads."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from lm.config import ModelConfig
from lm.nn.attention import Attend, AttentionMask
from lm.nn.attention_backend import BACKENDS, Choice, Site, choose
from lm.parallel import RULES, Rules

Array = jax.Array


def choice(cfg: ModelConfig, mesh: Mesh, *, length: int, training: bool, source_length: int | None = None) -> Choice:
    """Which back end computes packed rows of `length` tokens, and with an encoder those of `source_length` (None:
    `length`) of sources. Raises InputError if the one that is named can't."""
    device = mesh.devices.flat[0]
    site = Site(
        device.platform,
        _compute_capability(device),
        length,
        segments=True,
        dropout=training and cfg.dropout > 0,
        training=training,
        source_length=(source_length or length) if cfg.has_encoder else None,
    )
    return choose(cfg, site)


def attend_on(
    cfg: ModelConfig,
    mesh: Mesh,
    *,
    length: int,
    training: bool,
    source_length: int | None = None,
    manual: frozenset[str] = frozenset(),
    rules: Rules = RULES,
) -> Attend:
    """The back end of `choice`, on this mesh."""
    chosen = choice(cfg, mesh, length=length, training=training, source_length=source_length)
    return bound(chosen.name, mesh, manual=manual, rules=rules)


def bound(name: str, mesh: Mesh, *, manual: frozenset[str] = frozenset(), rules: Rules = RULES, **more: Any) -> Attend:
    """A back end whose rows and heads are split over a mesh; `more` arguments are its own.

    The compiler can split the reference, not the inside of a kernel; and a device that skips blocks should go by its
    own rows. Nothing is exchanged: rows and heads are independent.

    Args:
      manual: mesh axes that the caller is manual over: along them its arrays are a device's own already.
    """
    attend = functools.partial(BACKENDS[name], **more)
    automatic = frozenset(mesh.axis_names) - manual
    if name == "reference" or all(mesh.shape[axis] == 1 for axis in automatic):
        return attend
    rows, heads = (tuple(axis for axis in rules[of] if axis in automatic) or None for of in ("batch", "kv_heads"))
    of_heads, of_rows = PartitionSpec(rows, None, heads, None), PartitionSpec(rows, None)

    def split(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask: AttentionMask, **numbers: Any) -> Array:
        assert numbers["dropout"] is None and isinstance(mask.query_offset, int)

        def local(q: Array, k: Array, v: Array, segments: tuple[Array | None, Array | None]) -> Array:
            own = mask._replace(query_segments_BT=segments[0], key_segments_BS=segments[1])
            return attend(q, k, v, own, **numbers)

        segments = (mask.query_segments_BT, mask.key_segments_BS)
        return jax.shard_map(
            local,
            mesh=None if manual else mesh,  # None: that of the caller, which knows its manual axes
            in_specs=(of_heads, of_heads, of_heads, of_rows),
            out_specs=of_heads,
            axis_names=automatic,
            check_vma=False,
        )(q_BTNH, k_BSKH, v_BSKH, segments)

    return split


def _compute_capability(device: jax.Device) -> tuple[int, int] | None:
    """(9, 0) of an H100; None of what isn't an NVIDIA GPU."""
    major, dot, minor = str(getattr(device, "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if device.platform == "gpu" and dot else None
