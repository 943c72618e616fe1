"""The memory allocator of a process that computes on the CPU, under Linux with glibc."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from pathlib import Path

SWITCH = "LM_ALLOCATOR"
"""Environment variable: "system" leaves the allocator as it is."""

# mallopt(3), madvise(2)
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_MADV_HUGEPAGE = 14
_HUGE_PAGE = 2**21
_HUGE_PAGES_WANTED = "glibc.malloc.hugetlb=1"  # of GLIBC_TUNABLES: what we ask for, too
_ACCELERATORS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/accel0", "/dev/accel", "/dev/vfio/0", "/dev/dxg")


_said: str | None = None  # of the process, as malloc is
_huge = False
_inline = False


def note() -> str | None:
    """A line for the log about what malloc was told; None where it is as it was."""
    return _said


def keep_freed_memory() -> None:
    """Makes malloc keep what is freed for the next step; `note` tells whether it does.

    XLA's CPU back end takes its temporaries anew each step. glibc gives them back to the system each time, and their
    pages are then faulted in and zeroed again: a third of a step's time. So: no blocks of their own, never trimmed.
    That holds in the main thread alone: the arenas of others give every block above 64 MiB back, whatever they are
    told. So where the CPU is one device, `compute_inline` has the asking thread compute. With several, all threads
    share one arena, and wait for each other in it: small steps, and compiling, take up to half as long again.

    The kernel is asked for huge pages, where it gives them to who asks: of small ones looking up their addresses takes
    a twentieth of a step.

    To be called before the first thread begins. Left alone: other systems, accelerators, and a user who has chosen an
    allocator or its settings.
    """
    global _said, _huge
    if not (sys.platform == "linux" and _is_glibc() and _on_cpu(os.environ) and _undecided(os.environ)):
        return
    mallopt = ctypes.CDLL(None).mallopt
    settings = [(_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)]
    if not _one_device(os.environ):
        settings.append((_ARENA_MAX, 1))
    done = [mallopt(name, value) for name, value in settings]
    if all(done):
        _huge = _ask_for_huge_pages()
        pages = ", in huge pages" if _huge else ""
        _said = f"allocator  glibc's keeps what a step frees for the next{pages} ({SWITCH}=system leaves it as it was)"


def compute_inline() -> None:
    """Has the thread that asks JAX for a computation do it, where `keep_freed_memory` keeps memory for that thread.

    To be called before JAX has looked for devices.
    """
    global _inline
    if _said is not None and _one_device(os.environ):
        import jax  # not before it is wanted: the first half of a second of a command

        jax.config.update("jax_cpu_enable_async_dispatch", False)
        _inline = True


def computes_inline() -> bool:
    """Whether `compute_inline` was called and has an effect: what JAX's CPU is asked for is computed on return."""
    return _inline


def give_back() -> None:
    """Gives what is free back to the system once, where `keep_freed_memory` keeps it: compiling takes far more memory
    than the program that comes of it."""
    if _said is not None:
        ctypes.CDLL(None).malloc_trim(0)
    if _huge:
        _ask_for_huge_pages()  # what was asked for has been given back, too


def _ask_for_huge_pages() -> bool:
    """Has the heap grow to half of the machine's memory in addresses, none of it touched, and asks for huge pages in
    them. Whether the kernel agrees. Not where addresses are counted, or the kernel gives all or none."""
    import resource  # Unix has it

    try:
        setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        strict = Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2"
    except OSError:
        return False
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    if "[madvise]" not in setting or strict or any(limit != resource.RLIM_INFINITY for limit in limits):
        return False
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    block = libc.malloc(size)
    if block is None:
        return False
    libc.free(block)  # the heap keeps the addresses: `give_back` alone trims it
    first = -(-block // _HUGE_PAGE) * _HUGE_PAGE
    return libc.madvise(first, block + size - first, _MADV_HUGEPAGE) == 0


def _is_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (ValueError, OSError):
        return False


def _on_cpu(environment: Mapping[str, str]) -> bool:
    """Whether JAX will compute on the CPU: asked before JAX is loaded, so by its variable, else by the devices."""
    if platforms := environment.get("JAX_PLATFORMS"):
        return platforms.split(",")[0] == "cpu"
    return not any(Path(device).exists() for device in _ACCELERATORS)


def _one_device(environment: Mapping[str, str]) -> bool:
    """Whether the CPU is one device, as JAX will be told."""
    flags = environment.get("XLA_FLAGS", "")
    return "host_platform_device_count" not in flags and environment.get("JAX_NUM_CPU_DEVICES", "1") in ("1", "-1")


def _undecided(environment: Mapping[str, str]) -> bool:
    """Whether the user has said nothing about the allocator."""
    return (
        environment.get(SWITCH) != "system"
        and not any(name.startswith("MALLOC_") for name in environment)
        and all(
            not tunable.startswith("glibc.malloc") or tunable == _HUGE_PAGES_WANTED
            for tunable in environment.get("GLIBC_TUNABLES", "").split(":")
        )
        and "malloc" not in environment.get("LD_PRELOAD", "")
    )
