"""How the processes of a run find each other: by flags, by the environment, or as the cluster of the processes says."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import jax

from lm.config import InputError
from lm.processes import coordination, watch

CONNECT_SECONDS = 300.0
"""Within which all processes must have been started."""
ENVIRONMENT = {
    "coordinator": ("LM_COORDINATOR", "JAX_COORDINATOR_ADDRESS"),
    "processes": ("LM_PROCESSES", "JAX_NUM_PROCESSES"),
    "process": ("LM_PROCESS", "JAX_PROCESS_ID"),
}


def connect(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Makes this process one of `processes`, which find each other at `coordinator`, HOST:PORT of the first.

    What isn't given is taken from the environment; where nothing is said there either, from the cluster that JAX
    detects: Slurm, Open MPI, Kubernetes, Cloud TPU. A single process starts nothing and waits for nobody. To be called
    before JAX has looked for devices.

    Raises InputError for arguments that contradict each other or lack something. Ends the process where not all have
    found each other within CONNECT_SECONDS.
    """
    if coordination.client() is not None:  # the caller's own jax.distributed.initialize
        if not watch.watching():
            watch.start()
        return
    coordinator, processes, process = _environment(coordinator, processes, process)
    if processes is not None and processes < 1:
        raise InputError(f"--processes is {processes}: use 1 or more")
    method: str | None = "deactivate"
    if coordinator is None or processes is None or process is None:
        found = None if processes == 1 else coordination.cluster()
        if found is None:
            if (processes or 1) == 1 and coordinator is None and not process:
                return
            given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
            missing = [flag for flag, value in given.items() if value is None]
            raise InputError(
                f"a run of several processes needs --coordinator HOST:PORT, --processes N and --process I: "
                f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not given, and no cluster is detected"
            )
        method, processes = found[0], processes or found[1]
    _check_place(coordinator, processes, process)
    if processes == 1:
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from us
    with _ended_unless_connected(coordinator, processes, process):
        jax.distributed.initialize(
            coordinator, processes, process, cluster_detection_method=method,
            initialization_timeout=int(2 * CONNECT_SECONDS), shutdown_timeout_seconds=60,
        )  # fmt: skip
    watch.start()


def _check_place(coordinator: str | None, processes: int, process: int | None) -> None:
    """Raises InputError where the three can't be right."""
    if process is not None and not 0 <= process < processes:
        raise InputError(f"--process is {process} of --processes {processes}: use 0 to {processes - 1}")
    if coordinator is not None:
        host, colon, port = coordinator.rpartition(":")
        if not host or not colon or not port.isdecimal() or not 0 < int(port) < 65536:
            raise InputError(f"--coordinator is {coordinator!r}: give HOST:PORT of the first process, as in node0:1234")


def _environment(*given: Any) -> tuple[str | None, int | None, int | None]:
    """The three arguments, those that are None from the environment."""
    found: list[Any] = []
    for value, names in zip(given, ENVIRONMENT.values(), strict=True):
        name = next((name for name in names if value is None and os.environ.get(name)), None)
        text = None if name is None else os.environ[name]
        if text is not None and name not in ENVIRONMENT["coordinator"] and not text.isdecimal():
            raise InputError(f"the environment's {name} is {text!r}: a number is needed")
        found.append(value if text is None else text if name in ENVIRONMENT["coordinator"] else int(text))
    return found[0], found[1], found[2]


@contextlib.contextmanager
def _ended_unless_connected(coordinator: str | None, processes: int, process: int | None) -> Iterator[None]:
    """Ends the process, with a message, if it is inside for longer than CONNECT_SECONDS: JAX would abort it."""

    def end() -> None:
        where = f" at {coordinator}" if coordinator else ""
        if process == 0:
            found = f"only some of the {processes} processes have come{where}"
        elif coordinator is not None and not watch.reachable(coordinator):
            found = f"process 0 can't be reached{where}"
        else:
            found = f"the {processes} processes haven't found each other{where}"
        watch.end_now(
            f"error: {found} within {CONNECT_SECONDS:g} s: start the same command {processes} times, as --process 0 to "
            f"{processes - 1}, with the same --coordinator",
            watch.LOST_STATUS,
        )

    timer = threading.Timer(CONNECT_SECONDS, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
