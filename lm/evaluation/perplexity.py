"""Perplexity by one declared protocol: every token of every document scored exactly once, never across documents.

Shapes: R rows, W positions in a row, D documents.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lm.config import InputError, ModelConfig
from lm.data.pipeline import Batch
from lm.data.tokenizer import Tokenizer
from lm.data.tokens import TokenStore
from lm.nn import language_model
from lm.parallel import batch_shards, constrainer, put_rows


@dataclasses.dataclass(frozen=True)
class Scores:
    """Totals of one evaluation, and how they were taken. The ratios are computed once, from the totals."""

    nats: float
    tokens: int
    words: int
    bytes: int
    documents: int
    standard_error: float | None
    """Of nats_per_token over documents, by the ratio estimator; None for fewer than two documents."""
    protocol: Mapping[str, Any]
    seconds: float
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return _exp(self.nats / self.tokens)

    @property
    def word_perplexity(self) -> float | None:
        return _exp(self.nats / self.words) if self.words else None

    @property
    def bits_per_byte(self) -> float:
        return self.nats / self.bytes / math.log(2)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """The result as eval.py writes it; JSON has no NaN and no infinity, so these are None."""
        values = {
            **{name: getattr(self, name) for name in ("nats", "tokens", "words", "bytes", "documents")},
            **{name: getattr(self, name) for name in ("nats_per_token", "perplexity", "word_perplexity")},
            **{name: getattr(self, name) for name in ("bits_per_byte", "standard_error")},
            "protocol": dict(self.protocol),
            "model": dict(self.model),
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
        }
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }


class Window(NamedTuple):
    """Input ids [begin, end) of a document with its BOS. Targets are one further; the last `scored` of them count."""

    begin: int
    end: int
    scored: int


def windows(length: int, *, window: int, stride: int) -> Iterator[Window]:
    """The windows of a document of `length` ids, its BOS included: lm-evaluation-harness's rolling windows.

    The first scores up to `window` targets. Each later one scores the next `stride`, its input being the `window` ids
    that end just before its last target, so that a target has at least `window - stride + 1` ids before it.
    """
    targets = length - 1
    done = min(window, targets)
    if done > 0:
        yield Window(0, done, done)
    while done < targets:
        scored = min(stride, targets - done)
        done += scored
        yield Window(done - window, done, scored)


class Evaluator:
    """Scores the documents of a token store under a model; call it with parameters, as often as they change.

    Args:
      cfg: a resolved model config.
      store: the tokenised documents.
      tokenizer: whose ids they are; its `first_id` goes before every document.
      score_prompts: whether a document's prompt is scored; else it is context alone, and its words and bytes don't
        count either.
      window, stride: in tokens, 1 <= stride <= window.
      batch_size: rows at a time, rounded up to a multiple of the devices; changes results by rounding only.
      mesh: where the parameters live.
      max_tokens: take only the first documents by hash of their id, up to this many tokens. None: all.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        store: TokenStore,
        tokenizer: Tokenizer,
        *,
        window: int,
        stride: int,
        batch_size: int,
        mesh: Mesh,
        max_tokens: int | None = None,
        score_prompts: bool = False,
    ):
        _check_window(cfg, window, stride)
        self.cfg, self.store, self.mesh = cfg, store, mesh
        self.window, self.stride, self.first_id = window, stride, tokenizer.first_id
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}: use 1 window or more")
        self.rows = -(-batch_size // batch_shards(mesh)) * batch_shards(mesh)
        self.documents = _first_documents(store, max_tokens)
        self.prompts = None if score_prompts else store.prompts
        longest = self.tokens = 0
        for document in self.documents:
            length = len(store.document(document)) + (self.first_id is not None)
            longest = max(longest, length)
            self.tokens += max(length - self._unscored(document), 0)
        self.row_length = min(window, max(1, longest - 1))  # no row longer than the longest document
        self.protocol = {
            "window": window,
            "stride": stride,
            "bos": self.first_id,
            "eos": False,
            "data": store.source,
            "data_sha256": store.corpus_sha256,
            "tokenizer_sha256": tokenizer.sha256,
            "words": "whitespace",
            "bytes": "utf-8",
            "compute_dtype": cfg.compute_dtype,
        }
        if store.prompts is not None:
            self.protocol["prompts"] = "scored" if score_prompts else "context"

    def __call__(self, params: Any, progress: Callable[[int, int], None] | None = None) -> Scores:
        """Scores all documents; `progress` is told the tokens done and the tokens in all, a batch at a time."""
        start = time.perf_counter()
        nats_D, tokens_D = np.zeros(len(self.store)), np.zeros(len(self.store), np.int64)
        step = _compiled_nll(self.cfg, self.mesh)
        waiting: list[tuple[jax.Array, np.ndarray]] = []

        def collect() -> None:
            nll_RW, document_RW = waiting.pop(0)
            scored = document_RW >= 0
            # float64: a sum of millions of float32 nats would be off in its fourth digit
            nats = np.asarray(nll_RW, np.float64)[scored]
            nats_D[:] += np.bincount(document_RW[scored], nats, len(nats_D))
            tokens_D[:] += np.bincount(document_RW[scored], minlength=len(nats_D))
            if progress is not None:
                progress(int(tokens_D.sum()), self.tokens)

        for batch, document_RW in self._batches():
            waiting.append((step(params, put_rows(self.mesh, batch)), document_RW))
            if len(waiting) > 1:  # fetch a batch only once the next is under way
                collect()
        while waiting:
            collect()
        return self._total(nats_D[self.documents], tokens_D[self.documents], time.perf_counter() - start)

    def _total(self, nats_D: np.ndarray, tokens_D: np.ndarray, seconds: float) -> Scores:
        if not tokens_D.sum():
            raise InputError(f"nothing to score in {self.store.source}: no document has a token with one before it")
        words = size = 0
        for sizes in map(self.store.sizes, self.documents):
            words += sizes.words + (0 if self.prompts is not None else sizes.prompt_words)
            size += sizes.bytes + (0 if self.prompts is not None else sizes.prompt_bytes)
        return Scores(
            nats=math.fsum(nats_D),
            tokens=int(tokens_D.sum()),
            words=words,
            bytes=size,
            documents=len(self.documents),
            standard_error=ratio_standard_error(nats_D, tokens_D),
            protocol=self.protocol,
            seconds=seconds,
        )

    def _batches(self) -> Iterator[tuple[Batch, np.ndarray]]:
        """Batches of `rows` rows of windows, and for each position the document it is scored for, -1 for none.

        Windows that fit share a row, each a segment of its own with positions from 0: the model sees them apart.
        """
        batch, document_RW = self._empty()
        row = used = piece = 0
        for document, ids, window in self._windows():
            size = window.end - window.begin
            if used + size > self.row_length:
                row, used, piece = row + 1, 0, 0
            if row == self.rows:
                yield batch, document_RW
                batch, document_RW = self._empty()
                row = 0
            piece += 1
            place = (row, slice(used, used + size))
            batch.tokens_BT[place] = ids[window.begin : window.end]
            batch.targets_BT[place] = ids[window.begin + 1 : window.end + 1]
            batch.segments_BT[place] = piece
            batch.positions_BT[place] = np.arange(size)
            document_RW[row, used + size - window.scored : used + size] = document
            used += size
        if used:
            yield batch, document_RW

    def _windows(self) -> Iterator[tuple[int, np.ndarray, Window]]:
        head = np.array([] if self.first_id is None else [self.first_id], np.int32)
        for document in self.documents:
            ids = np.concatenate([head, self.store.document(document)])
            unscored = self._unscored(document)
            for window in windows(len(ids), window=self.window, stride=self.stride):
                # Of a window's last targets those that lie behind the prompt.
                scored = min(window.scored, window.end + 1 - unscored)
                if scored > 0:
                    yield document, ids, window._replace(scored=scored)

    def _unscored(self, document: int) -> int:
        """How many ids of a document, with what goes before it, aren't scored: the first one, and the prompt."""
        head = int(self.first_id is not None)
        if self.prompts is None:
            return 1
        prompt = int(self.prompts[document])  # counts the store's BOS, if there is one
        return max(head + prompt - (prompt > 0 and self.store.bos is not None), 1)

    def _empty(self) -> tuple[Batch, np.ndarray]:
        shape = (self.rows, self.row_length)
        tokens, targets, segments, positions = (np.zeros(shape, np.int32) for _ in range(4))
        return Batch(tokens, targets, np.zeros(shape, np.float32), segments, positions), np.full(shape, -1)


def ratio_standard_error(nats_D: np.ndarray, tokens_D: np.ndarray) -> float | None:
    """Standard error of Σ nats / Σ tokens over documents: the ratio estimator (Cochran 1977, section 2.11)."""
    documents = len(nats_D)
    if documents < 2:
        return None
    residual_D = nats_D - nats_D.sum() / tokens_D.sum() * tokens_D
    return float(np.sqrt(documents / (documents - 1) * np.sum(residual_D**2)) / tokens_D.sum())


@functools.lru_cache(maxsize=8)
def _compiled_nll(cfg: ModelConfig, mesh: Mesh) -> Callable[[Any, Batch], jax.Array]:
    constrain = constrainer(mesh)

    def nll(params: Any, batch: Batch) -> jax.Array:
        tokens, targets, _, segments, positions = batch
        return language_model.nll(
            params, tokens, targets, segments, positions, cfg=cfg, dropout_keys_B=None, constrain=constrain
        )

    return jax.jit(nll)


def _check_window(cfg: ModelConfig, window: int, stride: int) -> None:
    if not 1 <= stride <= window:
        raise InputError(f"stride {stride} and window {window}: a stride from 1 to the window scores every token once")
    if cfg.positions == "learned" and window > cfg.position_rows:
        raise InputError(
            f"window {window} is more than the model's {cfg.position_rows} learned positions: use at most that"
        )


def _first_documents(store: TokenStore, max_tokens: int | None) -> list[int]:
    """All documents, or the first by hash of their id while they hold at most `max_tokens`; at least one."""
    if max_tokens is None:
        return list(range(len(store)))
    order = sorted(range(len(store)), key=lambda i: hashlib.sha256(store.document_id(i).encode()).digest())
    taken: list[int] = []
    tokens = 0
    for document in order:
        tokens += len(store.document(document))
        if taken and tokens > max_tokens:
            break
        taken.append(document)
    return sorted(taken)


def _exp(nats: float) -> float:
    return math.inf if nats > 700 else math.exp(nats)  # exp(710) overflows
