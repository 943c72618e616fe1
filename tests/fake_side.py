"""A side of a measurement that sleeps. SPEC: {"seconds": a step, "fails": when: None, "start" or "step"}."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.serving import Side, serve


def build(spec: dict[str, Any]) -> Side:
    if spec["fails"] == "start":
        raise ValueError("no such thing here")
    done = 0

    def run(steps: int) -> None:
        nonlocal done
        print("noise that isn't an answer")
        for _ in range(steps):
            time.sleep(spec["seconds"])
            done += 1
            if spec["fails"] == "step" and done > 5:
                raise MemoryError("too large a step")

    return Side(run, {"parameters": 1})


if __name__ == "__main__":
    serve(build)
