"""python -m lm data inspect: what a source of text holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.console import Console

from lm import cli
from lm.config import DataConfig, RunConfig, TokenizerConfig
from lm.observe.bar import Bar


@dataclasses.dataclass(frozen=True)
class InspectData:
    """Shows what a source of text holds: documents, tokens, bytes per token, and some rows with their boundaries."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Source of text, as in data.train."""
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    rows: int = 3
    """Rows of the first batch to show."""
    seed: int = 0
    """Seed of the order of the rows."""


def inspect_data(argv: Sequence[str]) -> None:
    """Prints the totals and the rows."""
    arguments = cli.parse(InspectData, argv, prog="python -m lm data inspect")
    from lm.data import inspection
    from lm.validation import validate

    data = dataclasses.replace(arguments.data, train=arguments.source)
    validate(RunConfig(data=data, tokenizer=arguments.tokenizer))
    with Bar(Console(stderr=True)) as bar:
        lines = inspection.inspect(
            data, arguments.tokenizer, rows_shown=arguments.rows, seed=arguments.seed, progress=bar
        )
        for line in lines:
            print(line)
