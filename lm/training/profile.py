"""A profiler's trace of a few steps of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

FOLDER = "profile"
"""Of a run: its traces, one for each start."""
WARM_UP_STEPS = 3
TRACED_STEPS = 5


@contextlib.contextmanager
def traced(step: Callable[..., Any], workdir: Path, say: Callable[[str], None]) -> Iterator[Callable[..., Any]]:
    """The step, of whose calls a trace is written: steps 4 to 8 after a start, with what happens between them.

    It waits for the device before and after these, so that they are whole in the trace; no number changes.
    """
    folder = workdir / FOLDER
    calls, running = 0, False

    def begin(state: Any) -> None:
        nonlocal running
        jax.block_until_ready(state)
        jax.profiler.start_trace(folder)
        running = True

    def end() -> None:
        nonlocal running
        jax.profiler.stop_trace()
        running = False
        say(f"profile    {min(calls - WARM_UP_STEPS, TRACED_STEPS)} steps in {folder}")
        say(f"           to look at it: pip install xprof, then xprof {folder}")

    def traced_step(state: Any, *arguments: Any) -> Any:
        nonlocal calls
        if calls == WARM_UP_STEPS:
            begin(state)
        calls += 1
        after = step(state, *arguments)
        if calls == WARM_UP_STEPS + TRACED_STEPS:
            jax.block_until_ready(after)
            end()
        return after

    try:
        yield traced_step
    finally:
        if running:
            end()
        elif calls <= WARM_UP_STEPS:
            say(f"profile    none: the run ended with its step {calls}, and the trace begins after {WARM_UP_STEPS}")
