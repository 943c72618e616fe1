"""How fast text is generated, greedily, beside `generate` of transformers.

    python -m benchmarks generation --workloads W3 stories --stories DIR [--json FILE]

Both sides continue the same prompts with a cache, and don't end before all tokens are there. A turn of it can't take
less than the weights take to be read; on a CPU that time is shown beside it.
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
from lm.config import InputError


@dataclasses.dataclass(frozen=True)
class Generation(Reading):
    """Measures generation here and in transformers: new tokens a second, of prompts one at a time and together."""

    batch_sizes: tuple[int, ...] = (1, 16)
    """Prompts at a time."""
    prompt_tokens: int = 8
    """In each prompt."""
    new_tokens: int = 48
    """For each prompt."""


def cases(arguments: Generation, place: Path) -> Iterator[Case]:
    for name in arguments.workloads:
        folder = reading.model_folder(arguments, name, place)
        text = reading.story_ids(folder) if name == STORIES else None
        for rows in arguments.batch_sizes:
            shape = (rows, arguments.prompt_tokens)
            if text is None:
                ids = np.random.default_rng(0).integers(0, workload(name).vocabulary, shape)
            else:
                starts = np.arange(rows) * max((len(text) - arguments.prompt_tokens) // rows, 1)
                ids = np.stack([np.resize(text[start:], arguments.prompt_tokens) for start in starts])
            tokens = rows * arguments.new_tokens
            spec = {"new_tokens": arguments.new_tokens}
            yield Case(f"{name}, {rows} at a time", folder, ids.astype(np.int32), spec, tokens)


def run(arguments: Generation) -> dict[str, Any]:
    """The command."""
    reading.check(arguments)
    length = arguments.prompt_tokens + arguments.new_tokens
    for name in arguments.workloads:
        if name != STORIES and length > workload(name).context:
            raise InputError(
                f"--prompt-tokens {arguments.prompt_tokens} and --new-tokens {arguments.new_tokens} are more than the "
                f"{workload(name).context} positions of {name}: use fewer"
            )
    with tempfile.TemporaryDirectory() as name:
        return reading.run(arguments, cases(arguments, Path(name)), "generation", "New tokens (medians)")
