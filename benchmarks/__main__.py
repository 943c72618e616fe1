"""python -m benchmarks training|evaluation|generation --workloads W1 ...: the measurements beside peers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import evaluation, generation, training
from lm import cli
from lm.config import InputError
from lm.fields import nearest

COMMANDS: dict[str, tuple[type, Callable[..., Any]]] = {
    "training": (training.Training, training.run),
    "evaluation": (evaluation.Evaluation, evaluation.run),
    "generation": (generation.Generation, generation.run),
}


def main(argv: Sequence[str]) -> None:
    """Finds the command and runs it."""
    usage = f"usage: python -m benchmarks COMMAND ... (each has --help), COMMAND one of: {', '.join(COMMANDS)}"
    if not argv or argv[0] in ("-h", "--help"):
        print(usage, file=sys.stdout if argv else sys.stderr)
        sys.exit(0 if argv else 2)
    if argv[0] not in COMMANDS:
        raise InputError(f"no command {argv[0]!r}{nearest(argv[0], COMMANDS)}\n{usage}")
    kind, run = COMMANDS[argv[0]]
    run(cli.parse(kind, argv[1:], prog=f"python -m benchmarks {argv[0]}"))


if __name__ == "__main__":
    cli.main(main)
