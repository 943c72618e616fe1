"""Transfers between host and devices: in the training loop those that are asked for, and no others.

A hidden one makes the host wait for the devices, or the devices for the host, in every step.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from lm.parallel import replicated

Function = TypeVar("Function", bound=Callable[..., Any])


def none_hidden(mesh: Mesh) -> contextlib.AbstractContextManager[None]:
    """Inside, a transfer that JAX would make by itself raises: to the devices, and from them where they have memory of
    their own (on a CPU, JAX reads the device's memory in place and guards nothing)."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return (jax.transfer_guard_host_to_device if on_cpu else jax.transfer_guard)("disallow")


def freely(function: Function) -> Function:
    """The function, free of `none_hidden`: what isn't done every step may take its time."""

    @functools.wraps(function)
    def free(*arguments: Any) -> Any:
        with jax.transfer_guard("allow"):
            return function(*arguments)

    return free  # type: ignore[return-value]


def placing_progress(step: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """A compiled step that puts its last argument, a host scalar, on the devices itself."""
    everywhere = replicated(mesh)

    def put(value: np.float32) -> jax.Array:
        if jax.process_count() == 1:
            return jax.device_put(value, everywhere)
        # to each device by itself: onto all at once, device_put would compare hosts
        parts = [jax.device_put(value, device) for device in mesh.local_devices]
        return jax.make_array_from_single_device_arrays((), everywhere, parts)

    return lambda state, batch, progress: step(state, batch, put(progress))
