"""The texts of a run: opened, tokenised and laid out in rows, to train on and to validate on."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lm.config import InputError, RunConfig
from lm.data import tokenizer as tokenizers
from lm.data.corpus import Corpus, Splits, open_splits, open_validation
from lm.data.pipeline import Pipeline
from lm.data.rows import make_rows
from lm.data.sources.token_files import TokenFiles
from lm.data.tokenizer import Tokenizer
from lm.data.tokens import TokenStore, tokenize
from lm.training.budget import Budget

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


class Validation(NamedTuple):
    """A text to validate on, and its tokens."""

    text: Corpus | TokenFiles
    store: TokenStore


def splits_of(config: RunConfig) -> Splits:
    """The texts that a config trains and validates on."""
    data = config.data
    return open_splits(
        data.train,
        data.validation,
        document_separator=data.document_separator,
        pair_separator=data.pair_separator,
    )


def store_of(
    text: Corpus | TokenFiles, tokenizer: Tokenizer, config: RunConfig, progress: Progress | None = None
) -> TokenStore:
    """The tokens of a text, from the cache or made now."""
    tell = None if progress is None else functools.partial(progress, f"tokenising {text.source}")
    store = tokenize(text, tokenizer, processes=config.data.tokenizer_processes, progress=tell)
    if store.num_tokens <= len(store):
        raise InputError(f"{text.source} has nothing to predict: none of its {len(store)} documents has two tokens")
    return store


def validation_of(config: RunConfig) -> dict[str, Corpus | TokenFiles]:
    """The texts that a config validates on; the training text is opened only where they are held out of it."""
    data = config.data
    if not data.validation:
        return splits_of(config).validation
    return open_validation(
        data.validation, document_separator=data.document_separator, pair_separator=data.pair_separator
    )


def validation_key(name: str) -> str:
    """What the SHA-256 of a text to validate on is called in a checkpoint's provenance."""
    return "validation_sha256" + (f" of {name}" if name else "")


def together(digests: Sequence[str]) -> str:
    """Several digests as one; a single one as it is."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def tokenizer_of(config: RunConfig, splits: Splits, resume_from: Path | None, progress: Progress | None) -> Tokenizer:
    """Of a run that goes on the one it has; else the one that the config asks for."""
    if resume_from is not None:
        return tokenizers.load(resume_from)
    tell = None if progress is None else functools.partial(progress, "training the tokenizer")
    return tokenizers.build(config.tokenizer, [part.corpus for part in splits.train], progress=tell)


def pipeline_of(config: RunConfig, splits: Splits, stores: Sequence[TokenStore], say: Say) -> Pipeline:
    data, seed = config.data, config.training.seed
    rows = [
        make_rows(store, context=data.context, packing=data.packing, prompt_loss=data.prompt_loss, say=say)
        for store in stores
    ]
    weights = [part.weight for part in splits.train]
    return Pipeline(list(zip(weights, rows, strict=True)), batch_size=config.training.batch_size, seed=seed)


def say_texts(
    say: Say,
    pipeline: Pipeline,
    splits: Splits,
    stores: Sequence[TokenStore],
    validation: Mapping[str, Validation],
    budget: Budget,
) -> None:
    """What is trained and validated on, in a line or two."""
    documents, tokens = sum(map(len, stores)), sum(store.num_tokens for store in stores)
    held = [each.store for each in validation.values()]
    say(
        f"text       {documents:,} documents, {tokens:,} tokens to train on; "
        f"{sum(map(len, held)):,} documents, {sum(store.num_tokens for store in held):,} tokens to validate on"
    )
    skipped = sum(store.skipped for store in (*stores, *held))
    if skipped:
        say(f"           {skipped:,} empty documents left out")
    steps = budget.steps or 1000
    say(
        f"rows       {pipeline.rows_per_epoch:,} of {pipeline.context:,} tokens an epoch, "
        f"{100 * pipeline.fill(steps):.1f} % filled"
    )
    if len(stores) > 1:
        shares = pipeline.shares(steps)
        for part, store, share in zip(splits.train, stores, shares, strict=True):
            has = f"{store.num_tokens:,} tokens"
            say(f"mixture    {100 * share:.2f} % of the tokens from {part.corpus.source}, which has {has}")
