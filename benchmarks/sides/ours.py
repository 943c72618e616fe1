"""This project's process: memory and compiled programs as train.py has them, then what SPEC's "task" names."""

from __future__ import annotations

from typing import Any

from benchmarks.serving import Side, serve
from lm import allocator


def build(spec: dict[str, Any]) -> Side:
    from benchmarks.sides import ours_reading, ours_training
    from lm import compilation

    allocator.compute_inline()
    compilation.keep()
    return (ours_training if spec["task"] == "training" else ours_reading).build(spec)


if __name__ == "__main__":
    allocator.keep_freed_memory()  # before the first thread
    serve(build)
