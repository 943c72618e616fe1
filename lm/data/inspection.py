"""What a source looks like to a model: its documents, its tokens, and some rows with their boundaries."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np

from lm.config import DataConfig, InputError, TokenizerConfig
from lm.data import tokenizer as tokenizers
from lm.data.corpus import open_corpus
from lm.data.packing import Batch
from lm.data.pipeline import Pipeline
from lm.data.rows import make_rows
from lm.data.tokenizer import Tokenizer
from lm.data.tokens import TokenStore, tokenize


def inspect(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    *,
    rows_shown: int,
    seed: int,
    progress: Callable[[str, int, int], None],
) -> Iterator[str]:
    """Lines on the source `data.train`: its totals and its first rows, as training would see them."""
    if rows_shown < 0:
        raise InputError(f"rows is {rows_shown}: use 0 or more")
    corpus = open_corpus(data.train, document_separator=data.document_separator, pair_separator=data.pair_separator)
    used = tokenizers.build(tokenizer, [corpus], progress=functools.partial(progress, "training the tokenizer"))
    store = tokenize(
        corpus, used, processes=data.tokenizer_processes, progress=functools.partial(progress, "tokenising")
    )
    for name, value in totals(store, used).items():
        yield f"{name + ':':26}{value}"
    if not rows_shown:
        return
    try:
        laid = make_rows(store, context=data.context, packing=data.packing, prompt_loss=data.prompt_loss)
    except InputError as error:
        yield f"{'rows:':26}none: {error}"
        return
    pipeline = Pipeline([(1.0, laid)], batch_size=min(rows_shown, len(laid)), seed=seed)
    yield f"{'rows:':26}{pipeline.rows_per_epoch:,} an epoch, {100 * pipeline.fill(1):.2f} % of their positions filled"
    yield from rows(pipeline.batch_at(0), used)


def totals(store: TokenStore, tokenizer: Tokenizer) -> dict[str, str]:
    """The numbers of a store, as a person reads them."""
    size = words = prompt = 0
    longest = 0
    for document in range(len(store)):
        sizes = store.sizes(document)
        size += sizes.bytes + sizes.prompt_bytes
        words += sizes.words + sizes.prompt_words
        prompt += 0 if store.prompts is None else int(store.prompts[document])
        longest = max(longest, len(store.document(document)))
    special = len(store) * ((store.bos is not None) + (store.eos is not None))
    text_tokens = max(store.num_tokens - special, 1)
    found = {
        "source": store.source,
        "documents": f"{len(store):,}",
        "empty documents left out": f"{store.skipped:,}",
        "bytes": f"{size:,}",
        "words": f"{words:,}",
        "tokens": f"{store.num_tokens:,}, BOS and EOS included",
        "tokens of prompts": f"{prompt:,}",
        "bytes per token": f"{size / text_tokens:.3f}",
        "longest document": f"{longest:,} tokens",
        "vocabulary": f"{tokenizer.vocab_size:,} ({tokenizer.kind}), BOS {tokenizer.bos}, EOS {tokenizer.eos}",
        "sha256": store.corpus_sha256,
        "store": str(store.directory),
    }
    return {name: value for name, value in found.items() if value != "0"}


def rows(batch: Batch, tokenizer: Tokenizer, *, characters: int = 240) -> Iterator[str]:
    """The rows of a batch as lines of text: a line for each piece, its place in the row, and what the loss skips."""
    for number, (tokens_T, weights_T, segments_T) in enumerate(
        zip(batch.tokens_BT, batch.weights_BT, batch.segments_BT, strict=True)
    ):
        filled = int(np.count_nonzero(segments_T))
        yield f"row {number}: {filled} of {len(tokens_T)} positions filled, {int(weights_T.sum())} targets"
        for segment in range(1, int(segments_T.max()) + 1):
            place = np.flatnonzero(segments_T == segment)
            text = repr(tokenizer.decode(tokens_T[place]))
            if len(text) > characters:
                text = f"{text[: characters // 2]} … {text[-characters // 2 :]}"
            unscored = int(np.count_nonzero(weights_T[place] == 0))
            yield f"  piece {segment}, {place[0]}..{place[-1]}, {unscored} without a target: {text}"
