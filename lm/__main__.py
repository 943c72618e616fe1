"""python -m lm COMMAND: finds the subcommand."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from lm import cli
from lm.commands.convert import export_model, import_model
from lm.commands.generate import generate
from lm.commands.inspect_data import inspect_data
from lm.commands.launch import launch
from lm.commands.plan import plan
from lm.commands.train_tokenizer import train_tokenizer
from lm.config import InputError
from lm.fields import nearest

COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "generate": generate,
    "plan": plan,
    "launch": launch,
    "import": import_model,
    "export": export_model,
    "data inspect": inspect_data,
    "tokenizer train": train_tokenizer,
}


def main(argv: Sequence[str]) -> None:
    """Finds the subcommand, of one word or two, and runs it."""
    usage = f"usage: python -m lm COMMAND ... (each has --help), COMMAND one of: {', '.join(COMMANDS)}"
    if not argv or argv[0] in ("-h", "--help"):
        print(usage, file=sys.stdout if argv else sys.stderr)
        sys.exit(0 if argv else 2)
    for words in (1, 2):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            return COMMANDS[name](argv[words:])
    known = [name for name in COMMANDS if name.split()[0] == argv[0]]  # of two words, the second is wrong
    given = " ".join(argv[:2]) if known else argv[0]
    raise InputError(f"no command {given!r}{nearest(given, known or COMMANDS)}\n{usage}")


if __name__ == "__main__":
    cli.main(main)
