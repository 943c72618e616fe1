"""Scores a text under a language model: python eval.py MODEL [--data SOURCE] [--window N] [--stride N] [--json FILE]"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lm import api, cli


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Perplexity of a model on a text: every token of every document scored once, by the protocol that is printed."""

    model: tyro.conf.Positional[str]
    """A run directory, or one checkpoint inside it."""
    data: str | None = None
    """Source of text. None: the validation text of the run."""
    window: int | None = None
    """Longest input the model sees, in tokens. None: the training context."""
    stride: int | None = None
    """New tokens that each window scores. None: the window."""
    step: Literal["latest", "best"] | int = "latest"
    """Which checkpoint of the run."""
    batch_size: int | None = None
    """Windows in a batch; changes no result. None: as in the run's config."""
    compute_dtype: Literal["float32", "bfloat16", "tensorfloat32"] = "float32"
    """Operands of matrix products."""
    json: str | None = None
    """Write the result to this file."""


def evaluate(argv: Sequence[str]) -> None:
    arguments = cli.parse(Arguments, argv, prog="eval.py")
    run = api.load(arguments.model, step=arguments.step, dtype=arguments.compute_dtype)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("scoring")
        scores = api.evaluate(
            run,
            arguments.data,
            window=arguments.window,
            stride=arguments.stride,
            batch_size=arguments.batch_size,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    result = scores.to_dict()
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    Console().print(_table(result))


def _table(result: dict) -> Table:
    table = Table(title=f"{result['model']['path']}", show_header=False, title_justify="left")
    for name in ("nats_per_token", "standard_error", "perplexity", "word_perplexity", "bits_per_byte"):
        value = result[name]
        table.add_row(name.replace("_", " "), "-" if value is None else f"{value:.6g}")
    for name in ("tokens", "words", "bytes", "documents"):
        table.add_row(name, f"{result[name]:,}")
    for name, value in result["protocol"].items():
        table.add_row(name, str(value))
    table.add_row("seconds", f"{result['seconds']:.2f}")
    return table


if __name__ == "__main__":
    cli.main(evaluate)
