"""What JAX compiles: kept for the processes to come, in the cache folder, and timed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import platform
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jaxlib

from lm.config import InputError
from lm.cores import usable_cores
from lm.data import cache

MAX_BYTES = 2**30
"""Of all programs kept; those not used for longest go first. One is 0.1 to 2 MB."""
MIN_SECONDS = 0.1
"""What compiles faster isn't worth a file."""
HALF_WRITTEN_SECONDS = 60

_COMPILED = "/jax/core/compile/backend_compile_duration"
_STAGES = ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration", _COMPILED)
_FOUND = "/jax/compilation_cache/cache_hits"


def keep() -> None:
    """Turns on JAX's persistent compilation cache under the cache folder.

    What the user has set stays: another folder (JAX_COMPILATION_CACHE_DIR) or none (JAX_ENABLE_COMPILATION_CACHE=0).
    Where no folder can be had, nothing is kept. An entry that can't be read is compiled again.
    """
    config: Any = jax.config  # its options are no attributes that a type checker sees
    if not config.jax_enable_compilation_cache or config.jax_compilation_cache_dir is not None:
        return
    try:
        folder = cache.directory("compiled", environment())
    except InputError:
        return
    _clear_half_written(folder)
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")
    config.update("jax_compilation_cache_dir", str(folder))
    config.update("jax_compilation_cache_max_size", MAX_BYTES)  # with it, JAX locks the folder for each access
    config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)


def environment() -> str:
    """What a compiled program depends on besides the key that JAX gives it, as a folder's name.

    A program for a CPU holds machine code for its instruction set, divided over its threads.
    """
    digest = hashlib.sha256(f"{_processor()}\n{usable_cores()} threads".encode()).hexdigest()
    return f"jax-{jax.__version__}-jaxlib-{jaxlib.__version__}-cpu-{digest[:12]}"


_IN_CPUINFO = {
    *("vendor_id", "cpu family", "model", "model name", "stepping", "flags"),  # x86
    *("Features", "CPU implementer", "CPU architecture", "CPU variant", "CPU part"),  # ARM
}


def _processor() -> str:
    """Model and instruction sets of the processor, as well as the system tells them."""
    known = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        if sys.platform == "linux":
            first = Path("/proc/cpuinfo").read_text(errors="replace").partition("\n\n")[0]
            known += [line for line in first.splitlines() if line.partition(":")[0].strip() in _IN_CPUINFO]
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            known.append(subprocess.run(command, capture_output=True, text=True, check=False).stdout)
    return "\n".join(known)


def _clear_half_written(folder: Path) -> None:
    """Removes what a process that was killed left: JAX writes a program, then its time of use, and needs both."""
    for ours, other in (("-cache", "-atime"), ("-atime", "-cache")):
        for path in folder.glob(f"*{ours}"):
            with contextlib.suppress(FileNotFoundError):  # another process is as fast
                alone = not path.with_name(path.name.removesuffix(ours) + other).exists()
                if alone and path.stat().st_mtime < time.time() - HALF_WRITTEN_SECONDS:
                    path.unlink()


@dataclasses.dataclass
class Compiled:
    """What a thread has compiled while it was watched: seconds, lowering included; programs, and those found kept."""

    seconds: float = 0.0
    programs: int = 0
    found: int = 0

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s" + (" (cached)" if self.found == self.programs else "")


class _Watching(threading.local):
    now: Compiled | None = None


_watching = _Watching()


@contextlib.contextmanager
def said(what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Says how long it took to compile what is compiled inside by this thread, and whether all was in the cache."""
    outer, _watching.now = _watching.now, Compiled()
    try:
        yield
        if _watching.now.programs:
            say(f"compiled   {what} in {_watching.now}")
    finally:
        _watching.now = outer


def _on_duration(event: str, duration_secs: float, **_: str | int) -> None:
    if _watching.now is not None and event in _STAGES:
        _watching.now.seconds += duration_secs
        _watching.now.programs += event == _COMPILED


def _on_event(event: str, **_: str | int) -> None:
    if _watching.now is not None:
        _watching.now.found += event == _FOUND


jax.monitoring.register_event_duration_secs_listener(_on_duration)  # JAX tells all calls alike, on their own threads
jax.monitoring.register_event_listener(_on_event)
