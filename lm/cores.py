"""The processor cores that this process may use, and what they can."""

from __future__ import annotations

import functools
import os
from pathlib import Path


def usable_cores() -> int:
    """How many; where the system doesn't say it of a process (macOS), all that there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def have_bfloat16() -> bool:
    """Whether they have instructions for bfloat16 products that XLA uses: Intel's and AMD's, as Linux names them."""
    try:
        known = Path("/proc/cpuinfo").read_text(errors="replace").partition("\n\n")[0].split()
    except OSError:
        return False
    return "avx512_bf16" in known or "amx_bf16" in known
