"""python -m lm tokenizer train: a BPE of sources of text."""

from __future__ import annotations

import dataclasses
import functools
import shlex
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.console import Console

from lm import cli, output
from lm.config import InputError
from lm.observe.bar import Bar


@dataclasses.dataclass(frozen=True)
class TrainTokenizer:
    """Trains a BPE tokenizer on sources of text and writes it as a tokenizer.json."""

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Sources of text, as in data.train."""
    output: str = "tokenizer.json"
    """Where to write it."""
    vocab_size: int = 4096
    """Tokens, special tokens included."""
    byte_fallback: bool = False
    """Train on characters, with byte tokens for those left out, instead of on bytes."""
    special_tokens: tuple[str, ...] = ()
    """Special tokens besides BOS and EOS."""
    document_separator: str | None = None
    """Splits each text file into documents. None: one document a file."""
    pair_separator: str = "\n"
    """Between the two sides of a pair."""


def train_tokenizer(argv: Sequence[str]) -> None:
    """Trains, writes, and says what came out."""
    arguments = cli.parse(TrainTokenizer, argv, prog="python -m lm tokenizer train")
    if not arguments.sources:
        raise InputError("no source of text to train on: name one or more, as in data.train")
    from lm.data import tokenizer
    from lm.data.corpus import open_corpus
    from lm.data.sources.named import named_files

    target = output.writable_file("--output", arguments.output, read=named_files(arguments.sources))

    separators = {name: getattr(arguments, name) for name in ("document_separator", "pair_separator")}
    corpora = [open_corpus(source, **separators) for source in arguments.sources]
    with Bar(Console(stderr=True)) as bar:
        trained = tokenizer.train_tokenizer(
            corpora,
            arguments.vocab_size,
            byte_fallback=arguments.byte_fallback,
            special_tokens=arguments.special_tokens,
            progress=functools.partial(bar, "training the tokenizer"),
        )
    saved = trained.save(target)
    print(f"saved      {saved}: {trained.vocab_size:,} tokens, BOS {trained.bos}, EOS {trained.eos}")
    place = shlex.quote(str(saved))
    print(f"next       python train.py --tokenizer.kind file --tokenizer.path {place} --data.train SOURCE")
