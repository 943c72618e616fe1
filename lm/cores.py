"""The processor cores that this process may use, and what they can."""

from __future__ import annotations

import functools
import os
from pathlib import Path


def usable_cores() -> int:
    """How many; where the system doesn't say it of a process (macOS), all that there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def have_bfloat16() -> bool:
    """Whether they have instructions for bfloat16 products that XLA uses: Intel's and AMD's, as Linux names them."""
    return not _known().isdisjoint(("avx512_bf16", "amx_bf16"))


def have_wide_vectors() -> bool:
    """Whether 512 bits at a time are faster than 256: of AVX-512, where it doesn't slow the clock. The processors that
    know bfloat16, too, are those that came later."""
    return "avx512f" in _known() and have_bfloat16()


@functools.cache
def _known() -> frozenset[str]:
    """What the first of them can, as Linux names it; elsewhere nothing."""
    try:
        return frozenset(Path("/proc/cpuinfo").read_text(errors="replace").partition("\n\n")[0].split())
    except OSError:
        return frozenset()
