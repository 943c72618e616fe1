"""python -m lm COMMAND: thin, one function a subcommand."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import tyro

from lm import cli
from lm.config import InputError, nearest


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continues a prompt."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run directory, or one checkpoint inside it."""
    prompt: str = ""
    """Text to continue."""
    max_tokens: int | None = None
    """New tokens at most. None: 128, or what learned positions leave room for."""
    temperature: float = 0.8
    """0 is greedy."""
    top_k: int | None = None
    """Draw from the k most probable tokens alone. None: off."""
    top_p: float | None = None
    """Draw from the fewest tokens whose probabilities reach p. None: off."""
    samples: int = 1
    """Continuations of the prompt."""
    seed: int = 0
    """Seed of the draws."""
    step: Literal["latest", "best"] | int = "latest"
    """Which checkpoint of the run."""


def generate(argv: Sequence[str]) -> None:
    """Prints the prompt with each continuation."""
    arguments = cli.parse(Generate, argv, prog="python -m lm generate")
    if arguments.samples < 1:
        raise InputError(f"--samples is {arguments.samples}: use 1 or more")
    from lm import api  # here, so that Ctrl-C ends the command cleanly while JAX is loading

    texts = api.generate(
        api.load(arguments.model, step=arguments.step),
        [arguments.prompt] * arguments.samples,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    print(("\n" + "-" * 60 + "\n").join(arguments.prompt + text for text in texts))


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"generate": generate}


def main(argv: Sequence[str]) -> None:
    """Finds the subcommand and runs it."""
    usage = f"usage: python -m lm {{{','.join(COMMANDS)}}} ... (each has --help)"
    if not argv or argv[0] in ("-h", "--help"):
        print(usage, file=sys.stdout if argv else sys.stderr)
        sys.exit(0 if argv else 2)
    if argv[0] not in COMMANDS:
        raise InputError(f"no command {argv[0]!r}{nearest(argv[0], COMMANDS)}\n{usage}")
    COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    cli.main(main)
