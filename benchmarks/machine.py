"""What a figure depends on: processor, memory, versions, and how memory is allocated."""

from __future__ import annotations

import ctypes.util
import dataclasses
import json
import os
import platform
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from lm import output
from lm.config import InputError
from lm.cores import usable_cores

PACKAGES = ("lm", "jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")

Allocator = Literal["default", "huge_pages", "jemalloc"]
Dtype = Literal["float32", "bfloat16"]
_SETTINGS = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_CONF")


def allocator_environment(allocator: Allocator, jemalloc: str | None) -> dict[str, str]:
    """The environment of a process whose memory is allocated so.

    default: as a user gets it who asks for nothing. huge_pages: glibc's malloc, which takes transparent huge pages.
    jemalloc: huge pages, and memory once taken is kept.
    """
    kept = {name: value for name, value in os.environ.items() if name not in _SETTINGS}
    if allocator == "huge_pages":
        return kept | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    if allocator == "jemalloc":
        conf = "thp:always,dirty_decay_ms:-1,muzzy_decay_ms:-1"
        return kept | {"LD_PRELOAD": jemalloc_library(jemalloc), "MALLOC_CONF": conf}
    return kept


def jemalloc_library(path: str | None) -> str:
    """The library to load, an installed one where no path is given. Raises InputError where there is none."""
    if path is not None and not Path(path).is_file():
        raise InputError(f"--jemalloc {path}: there is no such file; name a libjemalloc.so.2")
    found = str(Path(path).absolute()) if path is not None else ctypes.util.find_library("jemalloc")
    if found is None:
        raise InputError("--allocators jemalloc: no libjemalloc is installed; install it, or name one with --jemalloc")
    return found


def describe() -> dict[str, Any]:
    """The machine, the versions, and the variables that change a timing."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    entries = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    entries = {name.strip(): value.strip() for name, value in entries.items()}
    flags = entries.get("flags", "").split()
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "processor": entries.get("model name", platform.processor()),
        "cores": usable_cores(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "memory_bytes_per_second": memory_bandwidth(),
        "transparent_huge_pages": huge_pages.read_text().strip() if huge_pages.exists() else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "environment": {
            name: value for name, value in os.environ.items() if name.startswith(("XLA_", "JAX_", "OMP_", "MKL_"))
        },
    }


def memory_bandwidth() -> float:
    """Bytes a second that all cores together read from main memory: the best of ten sums over 268 MB."""
    cores = usable_cores()
    parts = np.array_split(np.ones(2**26, np.float32), cores)
    passes = []
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(10):
            start = time.perf_counter()
            list(pool.map(np.sum, parts))
            passes.append(time.perf_counter() - start)
    return sum(part.nbytes for part in parts) / min(passes)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit(checkout: str) -> str | None:
    """Which commit a checkout is at, if it is one of git."""
    try:
        found = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def write_json(found: dict[str, Any], target: Path | None) -> None:
    """The figures as a file, whole or not at all."""
    if target is not None:
        with output.whole_file(target) as file:
            file.write(json.dumps(found, indent=2) + "\n")


def wide_console() -> Console:
    """The terminal; a file or a pipe gets its lines whole."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def check_counts(arguments: Any) -> None:
    """Raises InputError for a number that is 0 or less, and for a list of nothing where something has to be."""
    for field in dataclasses.fields(arguments):
        value, flag = getattr(arguments, field.name), "--" + field.name.replace("_", "-")
        if value == () and field.default != ():
            raise InputError(f"{flag} is empty: give one value or more")
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, (int, float)) and not isinstance(one, bool) and not 0 < one < float("inf"):
                raise InputError(f"{flag} is {one}: use more than 0")
