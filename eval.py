"""Scores a text under a language model: python eval.py MODEL [--data SOURCE] [--window N] [--stride N] [--json FILE]"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lm import cli
from lm.observe.bar import Bar


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Perplexity of a model on a text: every token of every document scored once, by the protocol that is printed."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run directory, or one checkpoint inside it."""
    data: str | None = None
    """Source of text, or the name of one of the run's validation texts. None: the first of these."""
    window: int | None = None
    """Longest input the model sees, in tokens. None: evaluation.window of the run, else its training context."""
    stride: int | None = None
    """New tokens that each window scores. None: evaluation.stride of the run if the window is too, else the window."""
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
    target = None if arguments.json is None else cli.writable_file("--json", arguments.json)
    from lm import api  # here, so that Ctrl-C ends the command cleanly while JAX is loading

    run = api.load(arguments.model, step=arguments.step, dtype=arguments.compute_dtype)
    with Bar(Console(stderr=True)) as bar:
        scores = api.evaluate(
            run,
            arguments.data,
            window=arguments.window,
            stride=arguments.stride,
            batch_size=arguments.batch_size,
            progress=bar,
        )
    result = scores.to_dict()
    _show(result)
    if target is not None:
        target.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _show(result: dict[str, Any]) -> None:
    """A table on a terminal, a line `name: value` each elsewhere."""
    names = ("nats_per_token", "standard_error", "perplexity", "word_perplexity", "bits_per_byte")
    rows = {name.replace("_", " "): "-" if result[name] is None else f"{result[name]:.6g}" for name in names}
    rows |= {name: f"{result[name]:,}" for name in ("tokens", "words", "bytes", "documents")}
    rows |= {f"protocol {name}": str(value) for name, value in result["protocol"].items()}
    rows |= {"model": f"{result['model']['path']} ({result['model']['parameters']:,} parameters)"}
    rows |= {"seconds": f"{result['seconds']:.2f}"}
    console = Console()
    if not console.is_terminal:
        print("\n".join(f"{name}: {value}" for name, value in rows.items()))
        return
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, Text(value))  # as it stands: [validation] is no markup
    console.print(table)


if __name__ == "__main__":
    cli.main(evaluate)
