"""train.py whose first process is killed as it completes the checkpoint of step LM_TEST_KILLED, for which the others
wait in Orbax. JAX tells those of it before their own watch knows, as it may on a busy machine."""

from __future__ import annotations

import functools
import os
import runpy
import signal
import time

import jax
import orbax.checkpoint as ocp

from lm import checkpoint
from lm.processes import coordination, watch

STEP = os.environ["LM_TEST_KILLED"]
LATE_SECONDS = 1.5
_write_manifest, _end = checkpoint.write_manifest, watch._Watch._end_without_first


def write_manifest(folder, *, step, **rest):
    if step == int(STEP):
        os.kill(os.getpid(), signal.SIGKILL)
    _write_manifest(folder, step=step, **rest)


def wait_at_barrier(*, key, timeout_ms):
    if coordination.own() == 0 or not key.endswith(f"async_commit_complete.{STEP}"):
        return ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)
    while not watch.closed(coordination.address()):
        time.sleep(0.01)
    raise jax.errors.JaxRuntimeError("UNAVAILABLE: Failed to send RPC to coordination service.")


def end_late(self):
    time.sleep(LATE_SECONDS)
    _end(self)


if __name__ == "__main__":
    checkpoint.write_manifest = write_manifest
    watch._Watch._end_without_first = end_late
    ocp.options.AsyncOptions = functools.partial(ocp.options.AsyncOptions, barrier_sync_fn=wait_at_barrier)
    runpy.run_path("train.py", run_name="__main__")
