"""A side of a measurement, in a process of its own: it warms up, then does steps when it is told to.

The process takes a number of steps a line on its standard input and answers with a line of JSON; the first line that
it writes says what it is. It ends with its input. What its libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

WARM_UP_STEPS = 3


class Side(NamedTuple):
    """run: does so many steps, and returns when they are done. facts: what the side is. device_bytes: the peak of an
    accelerator's memory; None on a CPU."""

    run: Callable[[int], None]
    facts: dict[str, Any]
    device_bytes: Callable[[], int | None] = lambda: None


def serve(build: Callable[[dict[str, Any]], Side]) -> None:
    """The whole process: the side is built from the JSON in the first argument."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**found: Any) -> None:
        print(json.dumps(found), file=answers, flush=True)

    began = time.perf_counter()
    side = build(json.loads(sys.argv[1]))
    side.run(WARM_UP_STEPS)
    peak_at_start = peak_bytes()
    _forget_peak()
    answer(**side.facts, start_seconds=time.perf_counter() - began, start_peak_bytes=peak_at_start)
    for line in sys.stdin:
        began = time.perf_counter()
        side.run(int(line))
        answer(seconds=time.perf_counter() - began, peak_bytes=peak_bytes(), device_peak_bytes=side.device_bytes())


def peak_bytes() -> int:
    """The most memory that this process has held. Not ru_maxrss, where /proc has it: that one begins with the peak of
    the process that started this one."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _forget_peak() -> None:
    """Where the kernel can: from now on the peak is that of the steps, without imports and compilation."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
