"""What a run directory holds, under which names, and how a checkpoint in it is found."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lm.config import EvaluationConfig, InputError, RunConfig
from lm.manifest import MANIFEST, read_manifest

BEST = "eval/nats_per_token"
"""The metric that decides which checkpoint is the best, the lowest, where `evaluation.best` doesn't say otherwise."""
TASK_METRICS = {"translation": "eval/bleu", "summarization": "eval/rougeL"}
"""The metric of each task that decides it where `evaluation.best` says so: the highest."""

CHECKPOINTS, CONFIG = "checkpoints", "config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
"""What the tokenizer's file is called: one of these, by its format."""
SOURCE = "source_"
"""What the name of the file of an encoder's own tokenizer begins with; the rest is one of TOKENIZERS."""


_OF_HUGGING_FACE = ("*config.json", "*.safetensors*", "*token*.json", "*.model", "vocab*", "merges.txt")


def read_of_a_model(path: str) -> list[Path]:
    """What a command that opens a model reads of its folder: files, and folders for all that is in them."""
    folder = Path(path)
    if (folder / CHECKPOINTS).is_dir():
        return [folder / CHECKPOINTS, folder / CONFIG]
    if (folder / MANIFEST).is_file():
        return [folder]
    return [file for pattern in _OF_HUGGING_FACE for file in folder.glob(pattern)]


class Criterion(NamedTuple):
    """What the best checkpoint is chosen by."""

    metric: str
    highest: bool

    def cost(self, metrics: Mapping[str, float]) -> float:
        """Lower is better; NaN where the metric is missing."""
        value = metrics.get(self.metric, math.nan)
        return -value if self.highest else value


def criterion(evaluation: EvaluationConfig) -> Criterion:
    """What a run chooses its best checkpoint by."""
    if evaluation.best == "task" and evaluation.task is not None:
        return Criterion(TASK_METRICS[evaluation.task], True)
    return Criterion(BEST, False)


@contextlib.contextmanager
def locked(run: str | Path) -> Iterator[None]:
    """Keeps other processes on this machine from training in a run directory, which must exist, at the same time.

    The lock is the system's, on the folder itself: it ends with the process, however that ends. None where the system
    or the file system has no such locks.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise InputError(f"another process is training in {run}: wait for it, or name another --workdir") from error
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(handle)


def steps(run: str | Path) -> list[int]:
    """The steps of a run's complete checkpoints, in order. Other folders with a number for a name don't count."""
    folder = Path(run) / CHECKPOINTS
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if is_step(entry))


def latest_step(run: str | Path) -> int | None:
    """The newest complete checkpoint's step; None where there is none."""
    return max(steps(run), default=None)


def best_step(run: str | Path) -> int | None:
    """The step that is best by what the run's config says, the first of equals; None where no checkpoint has that."""
    by = _criterion(run)
    costs = {step: by.cost(read_manifest(step_path(run, step)).metrics) for step in steps(run)}
    return min((step for step in costs if math.isfinite(costs[step])), key=lambda step: costs[step], default=None)


def locate(path: str | Path, step: str | int = "latest") -> Path:
    """The checkpoint that `path` names: a run directory's `step` (latest, best or a number), or one checkpoint itself.

    Raises InputError, naming what is there and the way out.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        own = read_manifest(path).step
        if step not in ("latest", "best") and str(step) != str(own):
            raise InputError(
                f"{path} is one checkpoint, of step {own}, not {step}: give the run directory to choose a step"
            )
        return path
    present = steps(path)
    if not present:
        raise InputError(
            f"{path} is not a run: {_what_is_there(path)}. Give a run directory (train.py's --workdir) or "
            "a Hugging Face folder"
        )
    if step == "latest":
        return step_path(path, present[-1])
    if step == "best":
        best = best_step(path)
        if best is None:
            raise InputError(
                f"no checkpoint of {path} has been evaluated ({_criterion(path).metric}), so none is the best: "
                f"use latest or one of the steps {listed(present)}"
            )
        return step_path(path, best)
    if not str(step).isdecimal() or int(step) not in present:
        raise InputError(f"{path} has no checkpoint {step}: use latest, best or one of the steps {listed(present)}")
    return step_path(path, int(step))


def read_config(folder: str | Path) -> RunConfig:
    """The config of a checkpoint, or of a run directory."""
    path = Path(folder) / CONFIG
    try:
        return RunConfig.from_json(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read: {error}") from error


def validation_sources(folder: str | Path) -> tuple[str, ...]:
    """The sources of a run's validation texts, as they were given; none where the folder holds no config of ours."""
    try:
        return read_config(folder).data.validation_sources
    except InputError:
        return ()


def step_path(run: str | Path, step: int) -> Path:
    """Where a run's checkpoint of a step lies."""
    return Path(run) / CHECKPOINTS / str(step)


def is_step(folder: Path) -> bool:
    """Whether a folder is a complete checkpoint of the step that it is named by."""
    if not re.fullmatch(r"0|[1-9][0-9]*", folder.name):
        return False
    try:
        return read_manifest(folder).step == int(folder.name)
    except InputError:
        return False


def listed(values: Sequence[object]) -> str:
    """The first dozen of some values, for a message."""
    shown = ", ".join(map(str, values[:12])) or "nothing"
    return f"{shown} and {len(values) - 12} more" if len(values) > 12 else shown


def _criterion(run: str | Path) -> Criterion:
    there = (Path(run) / CONFIG).is_file()
    return criterion(read_config(run).evaluation if there else EvaluationConfig())


def _what_is_there(path: Path) -> str:
    if not path.exists():
        return "it does not exist"
    if not path.is_dir():
        return "it is a file"
    names = sorted(entry.name for entry in path.iterdir())
    if (path / CHECKPOINTS).is_dir():
        return f"its {CHECKPOINTS} folder has no complete checkpoint"
    return f"it has no {CHECKPOINTS} folder and no {MANIFEST}, it holds {listed(names)}"
