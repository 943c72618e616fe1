"""The pairs of a corpus as an encoder–decoder takes them: two aligned token stores, and what each pair becomes.

An encoder reads [source EOS], a decoder [start target], and predicts [target EOS].
Shapes: D pairs of a corpus, K pairs that are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np

from lm.config import InputError
from lm.data.corpus import Corpus, Document, sha256
from lm.data.sources.token_files import TokenFiles
from lm.data.tokenizer import Tokenizer
from lm.data.tokens import Progress, TokenStore, tokenize

WAY_OUT = "use pairs:GLOB.tsv, pairs:SOURCE_FILE,TARGET_FILE or pairs:jsonl:GLOB#SOURCE,TARGET"


class Side(Corpus):
    """One side of all pairs of a corpus as a corpus of its own, in the same order and with the same ids.

    Args:
        pairs: opened with an empty `pair_separator`.
        target: which of the two.
    """

    def __init__(self, pairs: Corpus, *, target: bool):
        self.source, self._pairs, self._target = pairs.source, pairs, target
        self.skipped = 0

    def scan(self) -> Iterator[tuple[Document, int]]:
        """As `Corpus.scan`. Raises InputError where a document is no pair."""
        for document, position in self._pairs.scan():
            _check_pair(document, self.source)
            yield Document(document.id, document.text if self._target else document.prompt), position
        self.skipped = self._pairs.skipped

    @cached_property
    def size(self) -> int:
        return self._pairs.size

    def _key_now(self) -> str:
        return sha256(["target" if self._target else "source", self._pairs._key_now()])


class PairStore(NamedTuple):
    """The tokens of both sides: document d of the one is the source of document d of the other."""

    sources: TokenStore
    targets: TokenStore

    @property
    def source(self) -> str:
        """The text, as the corpus was asked for."""
        return self.targets.source

    @property
    def skipped(self) -> int:
        return self.targets.skipped

    @property
    def corpus_sha256(self) -> str:
        """Of the pairs' ids and texts alone."""
        return sha256([side.corpus_sha256 for side in self])


class Limits(NamedTuple):
    """Which pairs are kept and how long they may be: `data.source_context`, `.context`, `.long_pairs`,
    `.max_length_ratio`."""

    source: int
    target: int
    drop: bool
    ratio: float | None


class Counts(NamedTuple):
    """What the limits have done, in pairs."""

    empty: int
    """Left out: a side has no tokens."""
    uneven: int
    """Left out: one side has more than `ratio` times the tokens of the other."""
    long: int
    """Left out: a side is longer than its row."""
    cut_sources: int
    """Kept with a source whose end is cut off."""
    cut_targets: int
    """Kept with a target whose end is cut off; no EOS follows it."""


class Kept(NamedTuple):
    """The pairs that are kept, in their order."""

    pairs_K: np.ndarray
    """Their numbers, int64."""
    sources_K: np.ndarray
    """How many ids of each source are read, EOS not counted; int64."""
    targets_K: np.ndarray
    """How many ids of each target are, likewise."""
    whole_K: np.ndarray
    """Whether a target is read to its end, so that EOS follows."""
    counts: Counts


def sides(pairs: Corpus | TokenFiles) -> tuple[Side, Side]:
    """(sources, targets) of a corpus. Raises InputError, after a look at the first document, where it has no pairs."""
    if isinstance(pairs, TokenFiles):
        raise InputError(f"{pairs.source} is ready ids, which are no pairs: an encoder_decoder needs them, {WAY_OUT}")
    _check_pair(next(iter(pairs)), pairs.source)
    return Side(pairs, target=False), Side(pairs, target=True)


def tokenize_pairs(
    pairs: Corpus | TokenFiles,
    source_tokenizer: Tokenizer,
    tokenizer: Tokenizer,
    *,
    processes: int | None = None,
    progress: Progress | None = None,
) -> PairStore:
    """The tokens of both sides, from the cache or made now: see `tokens.tokenize`."""
    sources, targets = sides(pairs)
    both = PairStore(
        tokenize(sources, source_tokenizer, processes=processes, progress=progress),
        tokenize(targets, tokenizer, processes=processes, progress=progress),
    )
    assert len(both.sources) == len(both.targets), "the two sides of a corpus have other documents"
    return both


def text_lengths(store: TokenStore) -> np.ndarray:
    """How many ids each document has, BOS and EOS left out; int64 [D]."""
    return np.diff(store.offsets[:]) - (store.bos is not None) - (store.eos is not None)


def keep(store: PairStore, limits: Limits) -> Kept:
    """The pairs that the limits leave. In memory: some 50 bytes a pair, until it returns."""
    sources_D, targets_D = text_lengths(store.sources), text_lengths(store.targets)
    source_end, target_end = (int(one.eos is not None) for one in store)
    empty_D = (sources_D < 1) | (targets_D < 1)
    uneven_D = np.zeros_like(empty_D)
    if limits.ratio is not None:
        uneven_D = np.maximum(sources_D, targets_D) > limits.ratio * np.minimum(sources_D, targets_D)
    long_source_D, long_target_D = sources_D + source_end > limits.source, targets_D + target_end > limits.target
    long_D = (long_source_D | long_target_D) & limits.drop
    keep_D = ~(empty_D | uneven_D | long_D)
    pairs_K = np.flatnonzero(keep_D)
    whole_K = ~long_target_D[pairs_K]
    counts = Counts(
        empty=int(empty_D.sum()),
        uneven=int((uneven_D & ~empty_D).sum()),
        long=int((long_D & ~uneven_D & ~empty_D).sum()),
        cut_sources=int(long_source_D[pairs_K].sum()),
        cut_targets=int(np.count_nonzero(~whole_K)),
    )
    sources_K = np.minimum(sources_D[pairs_K], limits.source - source_end)
    targets_K = np.where(whole_K, targets_D[pairs_K], limits.target)
    return Kept(pairs_K, sources_K, targets_K, whole_K, counts)


def source_ids(store: PairStore, pair: int) -> np.ndarray:
    """What an encoder reads of a pair, int32: its source and EOS, where there is one."""
    return _with_end(store.sources, pair)


def target_ids(store: PairStore, pair: int) -> np.ndarray:
    """What is predicted of a pair, int32: its target and EOS, where there is one."""
    return _with_end(store.targets, pair)


def _with_end(store: TokenStore, document: int) -> np.ndarray:
    end = np.array([] if store.eos is None else [store.eos], np.int32)
    return np.concatenate([store.document(document).astype(np.int32), end])


def _check_pair(document: Document, source: str) -> None:
    if not document.prompt:
        raise InputError(
            f"{document.id} in {source} is no pair but one text, and an encoder_decoder needs a source for each "
            f"target: {WAY_OUT}"
        )
