"""How fast a text is scored beside the loop over transformers that people copy, on the same windows.

    python -m benchmarks evaluation --workloads W3 stories --stories DIR [--json FILE]

Ours is `lm.evaluation.perplexity.Evaluator`, which takes windows in batches; theirs one at a time, see
benchmarks/sides/transformers_reading.py.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import reading
from benchmarks.reading import STORIES, Case, Reading
from benchmarks.workloads import workload

STORY_WINDOW = 511


@dataclasses.dataclass(frozen=True)
class Evaluation(Reading):
    """Measures scoring here and in transformers: tokens a second, and by how much the mean nats differ."""

    windows: int = 8
    """Windows of random ids; a text of stories is taken whole."""
    stride_fraction: float = 0.5
    """New tokens of each window, as a part of it. 1: windows lie apart."""
    batch_size: int = 4
    """Our windows at a time."""


def cases(arguments: Evaluation, place: Path) -> Iterator[Case]:
    for name in arguments.workloads:
        folder = reading.model_folder(arguments, name, place)
        window = STORY_WINDOW if name == STORIES else workload(name).context - 1
        stride = max(int(window * arguments.stride_fraction), 1)
        if name == STORIES:
            ids = reading.story_ids(folder)
        else:
            length = window + 1 + stride * (arguments.windows - 1)
            ids = np.random.default_rng(0).integers(0, workload(name).vocabulary, length).astype(np.int32)
        spec = {"window": window, "stride": stride, "batch_size": arguments.batch_size}
        yield Case(f"{name}, window {window}, stride {stride}", folder, ids, spec, len(ids) - 1)


def run(arguments: Evaluation) -> dict[str, Any]:
    """The command."""
    reading.check(arguments)
    with tempfile.TemporaryDirectory() as name:
        return reading.run(arguments, cases(arguments, Path(name)), "evaluation", "Tokens scored (medians)")
