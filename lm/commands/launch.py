"""python -m lm launch: a command as several processes of this machine."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from lm import cli
from lm.config import InputError


@dataclasses.dataclass(frozen=True)
class Launch:
    """Runs train.py or eval.py as several processes on this machine, as a cluster would: for tests and for teaching.
    What follows -- is the command: python -m lm launch --processes 4 -- train.py PRESET ..."""

    processes: int
    """How many."""
    devices: int = 1
    """CPU devices of each."""
    timeout: float | None = None
    """Seconds after which all are killed. None: never."""


def launch(argv: Sequence[str]) -> None:
    """Runs them; its exit status is the first of theirs that isn't 0."""
    own, dashes, command = (list(argv), [], []) if "--" not in argv else _split(argv)
    arguments = cli.parse(Launch, own, prog="python -m lm launch")
    if not dashes:
        raise InputError("the command to launch follows --: python -m lm launch --processes 4 -- train.py PRESET ...")
    from lm.launch import launch as run

    if status := run(command, processes=arguments.processes, devices=arguments.devices, seconds=arguments.timeout):
        sys.exit(status)


def _split(argv: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """What comes before the first --, that itself, and what follows."""
    place = list(argv).index("--")
    return list(argv[:place]), ["--"], list(argv[place + 1 :])
