"""What the commands share: arguments from dataclasses, and one way to fail."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from lm.config import BUDGETS, InputError, RunConfig, TrainingConfig

Arguments = TypeVar("Arguments")


def main(command: Callable[[Sequence[str]], Any]) -> None:
    """Runs a command on the process's arguments. The user's mistakes end in one message and exit status 2."""
    try:
        command(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def parse(kind: type[Arguments], arguments: Sequence[str], *, prog: str, default: Arguments | None = None) -> Arguments:
    """A dataclass from command-line arguments. Wrong ones are told with the nearest right ones, exit status 2."""
    extra = {} if default is None else {"default": default}
    return tyro.cli(
        kind, args=list(arguments), prog=prog, config=(tyro.conf.FlagConversionOff,), **extra  # type: ignore[arg-type]
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TrainArguments:
    """Trains a language model: python train.py [PRESET | path/to/preset.py] [--workdir DIR] [--SECTION.FIELD VALUE ...]"""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    workdir: str | None = None
    """Run directory; one that holds a run continues it. None: runs/PRESET."""


def train_arguments(arguments: Sequence[str], preset: Callable[[str], RunConfig]) -> tuple[RunConfig, Path]:
    """The config and the run directory of a train.py command line. Without a preset: tiny."""
    named = bool(arguments) and not arguments[0].startswith("-")
    name, rest = (arguments[0], arguments[1:]) if named else ("tiny", arguments)
    default = preset(name)
    parsed = parse(TrainArguments, rest, prog="train.py [PRESET]", default=TrainArguments(default))
    training = _one_budget(parsed.config.training, default.training)
    config = dataclasses.replace(parsed.config, training=training)
    return config, Path(parsed.workdir or f"runs/{Path(name).stem}")


def _one_budget(training: TrainingConfig, default: TrainingConfig) -> TrainingConfig:
    """A budget given on the command line takes the place of the preset's; two given there stay, and are refused later."""
    given = [name for name in BUDGETS if getattr(training, name) not in (None, getattr(default, name))]
    if len(given) != 1:
        return training
    replaced = {
        name: None for name in BUDGETS if name not in given and getattr(training, name) == getattr(default, name)
    }
    return dataclasses.replace(training, **replaced)
