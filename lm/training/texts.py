"""The texts of a run: opened, tokenised and laid out in rows, to train on and to validate on."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lm import checkpoint
from lm.config import InputError, RunConfig, TokenizerConfig
from lm.data import tokenizer as tokenizers
from lm.data.corpus import Corpus, Splits, open_splits, open_validation
from lm.data.pair_rows import PairRows
from lm.data.pairs import Limits, PairStore, sides, tokenize_pairs
from lm.data.pipeline import Pipeline
from lm.data.rows import Rows, make_rows
from lm.data.sources.token_files import TokenFiles
from lm.data.tokenizer import Tokenizer
from lm.data.tokens import TokenStore, tokenize
from lm.training.budget import Budget

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


class Tokenizers(NamedTuple):
    """Of a run: `source` is the encoder's own; None: there is no encoder, or it uses the same."""

    tokenizer: Tokenizer
    source: Tokenizer | None = None


class Validation(NamedTuple):
    """A text to validate on, and its tokens; an encoder–decoder's are pairs."""

    text: Corpus | TokenFiles
    store: TokenStore | PairStore


def separator_of(config: RunConfig) -> str:
    """What stands between the two sides of pairs: an encoder–decoder takes them apart."""
    return "" if config.model.has_encoder else config.data.pair_separator


def splits_of(config: RunConfig) -> Splits:
    """The texts that a config trains and validates on."""
    data = config.data
    return open_splits(
        data.train,
        data.validation,
        document_separator=data.document_separator,
        pair_separator=separator_of(config),
    )


def tokens_of(
    text: Corpus | TokenFiles, run: Tokenizers, config: RunConfig, progress: Progress | None = None
) -> TokenStore | PairStore:
    """The tokens of a text, of an encoder–decoder those of its pairs."""
    if config.model.has_encoder:
        return pair_store_of(text, run, config, progress)
    return store_of(text, run.tokenizer, config, progress)


def pair_store_of(
    pairs: Corpus | TokenFiles, run: Tokenizers, config: RunConfig, progress: Progress | None = None
) -> PairStore:
    """The tokens of both sides of pairs, from the cache or made now."""
    tell = None if progress is None else functools.partial(progress, f"tokenising {pairs.source}")
    return tokenize_pairs(
        pairs,
        run.source or run.tokenizer,
        run.tokenizer,
        processes=config.data.tokenizer_processes,
        progress=tell,
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
        data.validation, document_separator=data.document_separator, pair_separator=separator_of(config)
    )


def validation_key(name: str) -> str:
    """What the SHA-256 of a text to validate on is called in a checkpoint's provenance."""
    return "validation_sha256" + (f" of {name}" if name else "")


def together(digests: Sequence[str]) -> str:
    """Several digests as one; a single one as it is."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def tokenizers_of(config: RunConfig, splits: Splits, resume_from: Path | None, progress: Progress | None) -> Tokenizers:
    """Of a run that goes on those it has; else those that the config asks for.

    Where sources have one of their own, each is trained on its side of the pairs alone.
    """
    if resume_from is not None:
        tokenizer, source = checkpoint.load_tokenizers(resume_from)
        assert tokenizer is not None, "a run has a tokenizer"
        return Tokenizers(tokenizer, source)
    corpora: list[Corpus | TokenFiles] = [part.corpus for part in splits.train]
    tell = None if progress is None else functools.partial(progress, "training the tokenizer")
    if not config.model.has_encoder:
        return Tokenizers(tokenizers.build(config.tokenizer, corpora, progress=tell))
    sources, targets = map(list, zip(*map(sides, corpora), strict=True))
    own = config.source_tokenizer
    if own.kind == "shared":
        return Tokenizers(tokenizers.build(config.tokenizer, [*sources, *targets], progress=tell))
    of_sources = TokenizerConfig(own.kind, own.path, own.vocab_size)
    return Tokenizers(
        tokenizers.build(config.tokenizer, targets, progress=tell),
        tokenizers.build(of_sources, sources, progress=tell),
    )


def pipeline_of(config: RunConfig, splits: Splits, stores: Sequence[TokenStore | PairStore], say: Say) -> Pipeline:
    weights = [part.weight for part in splits.train]
    rows = [_rows_of(config, store, say) for store in stores]
    components = list(zip(weights, rows, strict=True))
    return Pipeline(components, batch_size=config.training.batch_size, seed=config.training.seed)


def _rows_of(config: RunConfig, store: TokenStore | PairStore, say: Say) -> Rows:
    data = config.data
    if isinstance(store, PairStore):
        limits = Limits(data.source_length, data.context, data.long_pairs == "drop", data.max_length_ratio)
        assert config.model.start_id is not None, "the config is not resolved: start_id is None"
        return PairRows(store, limits, start_id=config.model.start_id, packing=data.packing, say=say)
    return make_rows(store, context=data.context, packing=data.packing, prompt_loss=data.prompt_loss, say=say)


def say_texts(
    say: Say,
    pipeline: Pipeline,
    splits: Splits,
    stores: Sequence[TokenStore | PairStore],
    validation: Mapping[str, Validation],
    budget: Budget,
) -> None:
    """What is trained and validated on, in a line or two."""
    held = [each.store for each in validation.values()]
    say(f"text       {_amount(stores)} to train on; {_amount(held)} to validate on")
    pairs = pipeline.source_context is not None
    skipped = sum(store.skipped for store in (*stores, *held))
    if skipped:
        say(f"           {skipped:,} empty {'pairs' if pairs else 'documents'} left out")
    for rows in pipeline.components:
        if isinstance(rows, PairRows):
            _say_counts(say, rows)
    steps = budget.steps or 1000
    fill = f"{100 * pipeline.fill(steps):.1f} % filled"
    if (source_fill := pipeline.source_fill(steps)) is None:
        say(f"rows       {pipeline.rows_per_epoch:,} of {pipeline.context:,} tokens an epoch, {fill}")
    else:
        say(
            f"rows       {pipeline.rows_per_epoch:,} an epoch, of {pipeline.source_context:,} source tokens, "
            f"{100 * source_fill:.1f} % filled, and {pipeline.context:,} target tokens, {fill}"
        )
    if len(stores) > 1:
        shares = pipeline.shares(steps)
        for part, rows, share in zip(splits.train, pipeline.components, shares, strict=True):
            has = f"{rows.tokens:,} {'target ' if pairs else ''}tokens"
            say(f"mixture    {100 * share:.2f} % of the tokens from {part.corpus.source}, which has {has}")


def _amount(stores: Sequence[TokenStore | PairStore]) -> str:
    """How many documents and tokens there are, BOS and EOS included."""
    pairs = [store for store in stores if isinstance(store, PairStore)]
    if pairs:
        sources, targets = (sum(side.num_tokens for side in each) for each in zip(*pairs, strict=True))
        number = sum(len(store.targets) for store in pairs)
        return f"{number:,} pairs, {sources:,} source and {targets:,} target tokens"
    plain = [store for store in stores if isinstance(store, TokenStore)]
    return f"{sum(map(len, plain)):,} documents, {sum(store.num_tokens for store in plain):,} tokens"


def _say_counts(say: Say, rows: PairRows) -> None:
    """What of the pairs was left out or cut."""
    counts = rows.counts
    left_out = {
        "with a side longer than its row": counts.long,
        "too uneven in length": counts.uneven,
        "with a side without tokens": counts.empty,
    }
    for reason, number in left_out.items():
        if number:
            say(f"           {number:,} pairs left out, {reason}")
    if counts.cut_sources or counts.cut_targets:
        say(f"           {counts.cut_sources:,} sources and {counts.cut_targets:,} targets cut to the length of a row")
