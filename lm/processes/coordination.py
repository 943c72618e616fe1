"""The coordination service of `jax.distributed`: a key-value store and barriers on the hosts, run by the first process.

JAX offers them only under `jax._src`. Its public way, `jax.experimental.multihost_utils`, runs a program on the devices
for every word that the hosts exchange: it waits for what they are computing, hangs with a process that is gone, and
knows no time limit. All private use of JAX for processes is in this file.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import jax
from jax._src import clusters, distributed

_POLL_MS = 10


def client() -> Any:
    """The connection to the service; None where there is a single process."""
    return distributed.global_state.client


def number() -> int:
    """How many processes there are. Asked of `jax.process_count` it would start a back end."""
    return distributed.global_state.num_processes if client() is not None else 1


def own() -> int:
    """Which of them this one is."""
    return distributed.global_state.process_id if client() is not None else 0


def address() -> str:
    """HOST:PORT of the service."""
    return distributed.global_state.coordinator_address or ""


def put(key: str, value: str, *, again: bool = False) -> None:
    """Stores a value; where there is one already it stays, unless it is to be stored `again`."""
    try:
        client().key_value_set(key, value, allow_overwrite=again)
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("ALREADY_EXISTS"):
            raise


def take(key: str, seconds: float) -> str | None:
    """A value, waited for as long as `seconds`; None where it isn't there by then."""
    try:
        return client().blocking_key_value_get(key, max(_POLL_MS, int(1000 * seconds)))
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("DEADLINE_EXCEEDED"):
            raise
        return None


def peek(key: str) -> str | None:
    """A value, if it is there."""
    try:
        return client().key_value_try_get(key)
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("NOT_FOUND"):
            raise
        return None


def below(folder: str) -> dict[str, str]:
    """The values whose keys begin with `folder`/, by the rest of their keys."""
    return {key.removeprefix(f"{folder}/"): value for key, value in client().key_value_dir_get(f"{folder}/")}


def drop(key: str) -> None:
    """Forgets a value, or all below a folder."""
    client().key_value_delete(key)


def meet(key: str, seconds: float) -> bool:
    """Waits for all processes to come to a barrier; whether all came within `seconds` of the first."""
    try:
        client().wait_at_barrier(key, int(1000 * seconds))
        return True
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("DEADLINE_EXCEEDED"):
            raise
        return False


@functools.cache
def cluster() -> tuple[str | None, int] | None:
    """The name of the cluster that started this process, where JAX has one for it, and how many processes it started.

    None outside of one. In Kubernetes only an indexed Job is looked at, and only where JAX's extra `k8s` is installed:
    other pods belong to nobody.
    """
    for kind in clusters.ClusterEnv._cluster_types:
        if kind.opt_in_only_method:
            continue
        in_a_job = "JOB_COMPLETION_INDEX" in os.environ and importlib.util.find_spec("kubernetes") is not None
        if kind.__name__ == "K8sCluster" and not in_a_job:
            continue
        if kind.is_env_present():
            # of Slurm the tasks of this step: those of the job may be more
            step = os.environ.get("SLURM_STEP_NUM_TASKS") if kind.name == "slurm" else None
            return kind.name or None, int(step) if step is not None else kind.get_process_count()
    return None
