"""Perplexity by one declared protocol: every token of every document scored exactly once, never across documents.

Shapes: R rows, W positions in a row, D documents, T ids of a document.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
from jax.sharding import Mesh

from lm.config import InputError, ModelConfig
from lm.data.tokenizer import Tokenizer
from lm.data.tokens import TokenStore
from lm.evaluation.scorer import rows_at_once, score
from lm.evaluation.scores import PerDocument, Scores, ratio_standard_error
from lm.evaluation.windows import Window, pack, windows, windows_behind

__all__ = ["EachDocument", "Evaluator", "Scores", "Window", "check_eos", "check_window"]
__all__ += ["ratio_standard_error", "windows"]

EachDocument = Callable[[int, np.ndarray, np.ndarray], None]


class Evaluator:
    """Scores the documents of a token store under a model; call it with parameters, as often as they change.

    Args:
      cfg: a resolved model config.
      store: the tokenised documents.
      tokenizer: whose ids they are; its `first_id` goes before every document.
      score_prompts: whether a document's prompt is scored; else it is context alone, and its words and bytes don't
        count either.
      score_eos: whether EOS follows every document and is scored.
      window, stride: in tokens, 1 <= stride <= window.
      batch_size: rows at a time, see `scorer.rows_at_once`; changes results by rounding only.
      mesh: where the parameters live; all its processes make the same calls and get the same result.
      rules: how, as `parallel.rules`.
      max_tokens: take only the first documents by hash of their id, up to this many tokens. None: all.

    Raises InputError where the arguments don't fit, and where no document has a token to score.
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
        rules: tuple[str, ...] = (),
        max_tokens: int | None = None,
        score_prompts: bool = False,
        score_eos: bool = False,
    ):
        check_window(cfg, window, stride)
        check_eos(tokenizer, score_eos)
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}: use 1 window or more")
        self.cfg, self.store, self.mesh, self.rules = cfg, store, mesh, rules
        self.window, self.stride, self.first_id = window, stride, tokenizer.first_id
        self.last_id = tokenizer.eos if score_eos else None
        self.documents = first_documents(store, max_tokens)
        self.prompts = None if score_prompts else store.prompts
        longest = self.tokens = 0
        extra = (self.first_id is not None) + (self.last_id is not None)
        for document in self.documents:
            length = len(store.document(document)) + extra
            longest = max(longest, length)
            self.tokens += max(length - self._unscored(document), 0)
        if not self.tokens:
            raise InputError(
                f"nothing to score in {store.source}: no document has a token with one before it to predict it from"
            )
        self.row_length = min(window, longest - 1)  # no row longer than the longest document
        self.rows = rows_at_once(batch_size, self.row_length, mesh)
        self.protocol = {
            "window": window,
            "stride": stride,
            "bos": self.first_id,
            "eos": False if self.last_id is None else self.last_id,
            "data": store.source,
            "data_sha256": store.corpus_sha256,
            "tokenizer_sha256": tokenizer.sha256,
            "words": "whitespace",
            "bytes": "utf-8",
            "compute_dtype": cfg.compute_dtype,
        }
        if store.prompts is not None:
            self.protocol["prompts"] = "scored" if score_prompts else "context"

    def __call__(
        self,
        params: Any,
        progress: Callable[[int, int], None] | None = None,
        each_document: EachDocument | None = None,
    ) -> Scores:
        """Scores all documents.

        Args:
          progress: is told the tokens done and the tokens in all, a batch at a time.
          each_document: gets each document's number, its ids_T without what stands before it, and their nats_T,
            float32, NaN where one isn't scored; in order, once a document is done.
        """
        start = time.perf_counter()
        place = {document: number for number, document in enumerate(self.documents)}
        nats_D, tokens_D = np.zeros(len(place)), np.zeros(len(place), np.int64)
        hand_out = None if each_document is None else _InOrder(self, each_document)
        done = 0
        packed = pack(self._windows(), rows=self.rows, length=self.row_length)
        for pieces, (nats_RW,) in score(params, packed, cfg=self.cfg, mesh=self.mesh, rules=self.rules):
            for piece in pieces:
                nats = nats_RW[piece.row, piece.begin : piece.begin + piece.scored]
                # float64: a sum of millions of float32 nats would be off in its fourth digit
                nats_D[place[piece.text]] += nats.sum(dtype=np.float64)
                tokens_D[place[piece.text]] += piece.scored
                done += piece.scored
                if hand_out is not None:
                    hand_out.add(piece.text, piece.first, nats)
            if progress is not None:
                progress(done, self.tokens)
        if hand_out is not None:
            hand_out.until(None)
        assert done == self.tokens, (done, self.tokens)
        return self._total(nats_D, tokens_D, time.perf_counter() - start)

    def _total(self, nats_D: np.ndarray, tokens_D: np.ndarray, seconds: float) -> Scores:
        words_D, bytes_D = self._sizes
        documents = self.documents
        each = PerDocument(lambda i: self.store.document_id(documents[i]), nats_D, tokens_D, words_D, bytes_D)
        return Scores(
            nats=math.fsum(nats_D) if np.isfinite(nats_D).all() else math.nan,
            tokens=int(tokens_D.sum()),
            words=int(words_D.sum()),
            bytes=int(bytes_D.sum()),
            documents=len(documents),
            standard_error=ratio_standard_error(nats_D, tokens_D),
            protocol=self.protocol,
            seconds=seconds,
            per_document=each,
        )

    @cached_property
    def _sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """words_D and bytes_D of what is scored."""
        words_D, bytes_D = np.zeros((2, len(self.documents)), np.int64)
        for number, sizes in enumerate(map(self.store.sizes, self.documents)):
            words_D[number] = sizes.words + (0 if self.prompts is not None else sizes.prompt_words)
            bytes_D[number] = sizes.bytes + (0 if self.prompts is not None else sizes.prompt_bytes)
        return words_D, bytes_D

    def ids(self, document: int) -> np.ndarray:
        """A document's ids with what stands before it and, where it is scored, EOS behind."""
        head, tail = ([] if one is None else [one] for one in (self.first_id, self.last_id))
        return np.concatenate([np.array(head, np.int32), self.store.document(document), np.array(tail, np.int32)])

    def _windows(self) -> Iterator[tuple[int, np.ndarray, Window]]:
        for document in self.documents:
            ids = self.ids(document)
            unscored = self._unscored(document)
            for window in windows_behind(ids, unscored, window=self.window, stride=self.stride):
                yield document, ids, window

    def _unscored(self, document: int) -> int:
        """How many ids of a document, with what goes before it, aren't scored: the first one, and the prompt."""
        head = int(self.first_id is not None)
        if self.prompts is None:
            return 1
        prompt = int(self.prompts[document])  # counts the store's BOS, if there is one
        return max(head + prompt - (prompt > 0 and self.store.bos is not None), 1)


class _InOrder:
    """Gathers the nats of documents, whose windows come in order, and hands each out once it is whole."""

    def __init__(self, evaluator: Evaluator, each: EachDocument):
        self._evaluator, self._each = evaluator, each
        self._left = iter(evaluator.documents)
        self._current: tuple[int, np.ndarray, np.ndarray] | None = None

    def add(self, document: int, first: int, nats: np.ndarray) -> None:
        self.until(document)
        assert self._current is not None
        self._current[2][first : first + len(nats)] = nats

    def until(self, document: int | None) -> None:
        """Hands out the documents before this one, which becomes the current one; None: all."""
        while self._current is None or self._current[0] != document:
            if self._current is not None:
                number, ids_T, nats_T = self._current
                head = int(self._evaluator.first_id is not None)
                self._each(number, ids_T[head:], nats_T[head:])
            following = next(self._left, None)
            if following is None:
                assert document is None
                return
            ids_T = self._evaluator.ids(following)
            self._current = following, ids_T, np.full(len(ids_T), np.nan, np.float32)


def check_window(cfg: ModelConfig, window: int, stride: int) -> None:
    """Raises InputError for a window and a stride that don't score every token once, or that the model can't take."""
    if window < 1:
        raise InputError(f"window {window}: use 1 token or more")
    if not 1 <= stride <= window:
        raise InputError(f"stride {stride} and window {window}: a stride from 1 to the window scores every token once")
    if cfg.positions == "learned" and window > cfg.position_rows:
        raise InputError(
            f"window {window} is more than the model's {cfg.position_rows} learned positions: use at most that"
        )


def check_eos(tokenizer: Tokenizer, score_eos: bool) -> None:
    """Raises InputError where EOS is to be scored and there is none."""
    if score_eos and tokenizer.eos is None:
        raise InputError(f"the tokenizer ({tokenizer.kind}) has no EOS to score: leave --score-eos out")


def first_documents(store: TokenStore, max_tokens: int | None) -> list[int]:
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
