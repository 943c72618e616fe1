"""Train, evaluate and open transformer language models with JAX.

import lm
run = lm.load("runs/tiny")
lm.evaluate(run)
lm.generate(run, ["def "], max_tokens=50)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm.api import (
        Candidate,
        Loaded,
        Scores,
        TaskScores,
        evaluate,
        evaluate_task,
        generate,
        load,
        n_best,
        preset,
        preset_names,
        stream,
        train,
    )
    from lm.config import InputError, RunConfig

__all__ = [
    "Candidate", "InputError", "Loaded", "RunConfig", "Scores", "TaskScores", "evaluate", "evaluate_task", "generate",
    "load", "n_best", "preset", "preset_names", "stream", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Loads the API at first use, so that `import lm` is instant (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'lm' has no attribute {name!r}")
    import importlib

    home = "lm.config" if name in ("InputError", "RunConfig") else "lm.api"
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
