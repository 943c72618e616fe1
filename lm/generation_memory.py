"""The memory that generation takes, and whether there is so much: asked before anything runs.

Shapes: B rows, W beams, S source, M new tokens, V vocabulary rows.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lm.config import InputError, ModelConfig
from lm.decoding import Sizes, empty_cache
from lm.nn.matmul import numerics


def check_memory(params: Any, cfg: ModelConfig, sizes: Sizes, *, prompts: int) -> None:
    """Raises InputError where a batch takes more than the device's free memory."""
    needed, free, beams = batch_bytes(cfg, sizes), free_bytes(params), sizes.beams
    if free is None or needed <= free:
        return
    what = ("1 prompt" if prompts == 1 else f"{prompts:,} prompts at a time") + (
        f" x {beams:,} beams" if beams > 1 else ""
    )
    fewer = ("fewer beams, " if beams > 1 else "") + ("fewer prompts at a time, " if prompts > 1 else "")
    raise InputError(
        f"{what}, of up to {sizes.slots + sizes.source:,} tokens each, need {needed / 1e9:,.1f} GB for keys, values "
        f"and ids, and {free / 1e9:,.1f} GB are free: use {fewer.removesuffix(', ')}{' or ' if fewer else ''}fewer "
        "tokens"
    )


def batch_bytes(cfg: ModelConfig, sizes: Sizes) -> int:
    """Of keys and values, of ids, and in a search of what puts beams in another order: that makes new ones first."""
    rows, beams = sizes.rows, sizes.beams
    cache = jax.eval_shape(lambda: empty_cache(cfg, sizes))
    one = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache._replace(length=None)))
    width = 2 * cfg.num_layers * cfg.kv_heads * cfg.head_width * jnp.dtype(numerics(cfg.compute_dtype).dtype).itemsize
    memory, logits, ids = rows * sizes.source * width, 8 * rows * beams * cfg.padded_vocabulary, 4 * rows * sizes.new
    moving = one * beams // (2 * cfg.num_layers)  # the keys or the values of a layer, beside where they were
    if beams == 1:
        return one + moving + memory + logits + ids
    # The caches before and after a turn, and the prompts' own; what goes on and what has ended, both again after a
    # turn, and two candidates a beam; the powers of the lengths.
    return one * (1 + 2 * beams) + moving + memory + logits + 6 * beams * ids + 24 * (sizes.new + 2)


def free_bytes(params: Any) -> int | None:
    """Memory that is free on the device of the parameters; None where nothing says."""
    leaf = next((leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)), None)
    device = jax.local_devices()[0] if leaf is None else next(iter(leaf.devices()))
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if device.platform != "cpu":
        return None
    found = [*_available(), *_left_by_group()]
    return min(found) if found else None


def _available() -> list[int]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return []
    return [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]


def _left_by_group(group: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What the limit of a container leaves. Files that were read and can be dropped are in use, but free."""
    for limit, used, details, dropped in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file "),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file "),
    ):
        try:
            lines = (group / details).read_text().splitlines()
            files = sum(int(line.removeprefix(dropped)) for line in lines if line.startswith(dropped))
            return [int((group / limit).read_text()) - int((group / used).read_text()) + files]
        except (OSError, ValueError):  # no such limit
            continue
    return []
