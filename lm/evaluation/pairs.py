"""Teacher-forced evaluation of an encoder–decoder: every token of every target, EOS included, scored once given its
source and what stands before it.

Shapes: R rows, S source positions in a row, W target positions in a row, D pairs, T ids of a target.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from lm.config import InputError, ModelConfig
from lm.data.packing import Batch
from lm.data.pairs import PairStore, source_ids, target_ids
from lm.data.tokenizer import Tokenizer
from lm.evaluation.perplexity import EachDocument, first_documents
from lm.evaluation.scorer import rows_at_once, score
from lm.evaluation.scores import PerDocument, Scores, ratio_standard_error
from lm.evaluation.windows import Packed, Piece
from lm.generation import shortened
from lm.nn.source import Source

SHORTEST = 16
"""Positions in the shortest rows; the others have twice as many, four times and so on."""


class Shape(NamedTuple):
    """Positions in the rows of a batch."""

    target: int
    source: int


class PairEvaluator:
    """Scores the targets of pairs under a model; call it with parameters, as often as they change.

    A pair has a row of its own, and pairs of like lengths are computed together: the result doesn't depend on which.
    None is truncated, but for what learned positions can't hold: the end of a source that is longer is cut off, and a
    pair with a longer target left out; `protocol["truncation"]` says so.

    Args:
      cfg: a resolved model config.
      store: the tokenised pairs.
      tokenizer, source_tokenizer: whose ids they are; None: sources have the same as targets.
      batch_size: pairs at a time, see `scorer.rows_at_once`; changes results by rounding only.
      mesh, rules: where the parameters live, as for `perplexity.Evaluator`.
      max_tokens: take only the first pairs by hash of their id, with up to this many target tokens. None: all.

    Raises InputError where the arguments don't fit, and where there is nothing to score.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        store: PairStore,
        tokenizer: Tokenizer,
        source_tokenizer: Tokenizer | None,
        *,
        batch_size: int,
        mesh: Mesh,
        rules: tuple[str, ...] = (),
        max_tokens: int | None = None,
    ):
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}: use 1 pair or more")
        if cfg.start_id is None:
            raise InputError(
                "the model has no id that targets follow: its model.start_id is None, and its tokenizer has no BOS or "
                "EOS"
            )
        self.cfg, self.store, self.mesh, self.rules, self.batch_size = cfg, store, mesh, rules, batch_size
        self._start = cfg.start_id
        wanted = first_documents(store.targets, max_tokens)
        self._longest = cfg.position_rows if cfg.positions == "learned" else None
        sources_D, targets_D = (_lengths(side)[wanted] for side in store)
        fits_D = targets_D <= (self._longest or targets_D.max())
        cut, left_out = int((sources_D[fits_D] > (self._longest or sources_D.max())).sum()), int((~fits_D).sum())
        some_D = fits_D & (sources_D > 0) & (targets_D > 0)
        self.documents = [document for document, some in zip(wanted, some_D.tolist(), strict=True) if some]
        if not self.documents:
            raise InputError(
                f"nothing to score in {store.source}: "
                + (f"all targets are longer than the model's {self._longest} positions" if left_out else "no token")
            )
        self._sources_D = np.minimum(sources_D[some_D], self._longest or sources_D.max())
        self._targets_D = targets_D[some_D]
        self.tokens = int(self._targets_D.sum())
        self.batches = self._arranged()
        self.rows = max(len(documents) for _, documents in self.batches)
        self.protocol = {
            "data": store.source,
            "data_sha256": store.corpus_sha256,
            "tokenizer_sha256": tokenizer.sha256,
            "source_tokenizer_sha256": (source_tokenizer or tokenizer).sha256,
            "start": self._start,
            "eos": False if store.targets.eos is None else store.targets.eos,
            "truncation": self._truncation(cut, left_out),
            "words": "whitespace",
            "bytes": "utf-8",
            "compute_dtype": cfg.compute_dtype,
        }

    def __call__(
        self,
        params: Any,
        progress: Callable[[int, int], None] | None = None,
        each_document: EachDocument | None = None,
    ) -> Scores:
        """Scores all pairs.

        Args:
          progress: is told the tokens done and the tokens in all, a batch at a time.
          each_document: gets each pair's number, the ids_T of its target with EOS, and their nats_T, float32; in order,
            once all are done.
        """
        began = time.perf_counter()
        nats_D = np.zeros(len(self.documents))
        found: dict[int, np.ndarray] = {}
        done = 0
        packed = (self._packed(shape, places) for shape, places in self.batches)
        for pieces, (nats_RW,) in score(params, packed, cfg=self.cfg, mesh=self.mesh, rules=self.rules):
            for piece in pieces:
                nats = nats_RW[piece.row, : piece.scored]
                nats_D[piece.text] = nats.sum(dtype=np.float64)
                done += piece.scored
                if each_document is not None:
                    found[piece.text] = nats.copy()
            if progress is not None:
                progress(done, self.tokens)
        assert done == self.tokens, (done, self.tokens)
        for place, document in enumerate(self.documents if each_document is not None else ()):
            assert each_document is not None
            each_document(document, target_ids(self.store, document), found.pop(place))
        return self._total(nats_D, time.perf_counter() - began)

    def _total(self, nats_D: np.ndarray, seconds: float) -> Scores:
        words_D, bytes_D = self._sizes
        targets, documents = self.store.targets, self.documents
        each = PerDocument(lambda i: targets.document_id(documents[i]), nats_D, self._targets_D, words_D, bytes_D)
        return Scores(
            nats=math.fsum(nats_D) if np.isfinite(nats_D).all() else math.nan,
            tokens=self.tokens,
            words=int(words_D.sum()),
            bytes=int(bytes_D.sum()),
            documents=len(documents),
            standard_error=ratio_standard_error(nats_D, self._targets_D),
            protocol=self.protocol,
            seconds=seconds,
            per_document=each,
        )

    @cached_property
    def _sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """words_D and bytes_D of the targets."""
        sizes = [self.store.targets.sizes(document) for document in self.documents]
        return np.array([each.words for each in sizes]), np.array([each.bytes for each in sizes])

    def _arranged(self) -> list[tuple[Shape, list[int]]]:
        """Batches, the largest first, as (their shape, places of their pairs in `documents`).

        Rows are as long as the bucket of their target and of their source is. Pairs of a shape of which there is less
        than a batch go into a larger one, so that nothing is compiled for a few of them.
        """
        shapes: dict[Shape, list[int]] = {}
        for place, lengths in enumerate(zip(self._targets_D.tolist(), self._sources_D.tolist(), strict=True)):
            shapes.setdefault(Shape(*map(self._bucket, lengths)), []).append(place)
        batches: list[tuple[Shape, list[int]]] = []
        held, held_shape = list[int](), Shape(0, 0)
        ordered = sorted(shapes, reverse=True)
        for shape in ordered:
            held_shape = Shape(*map(max, held_shape, shape))
            held += shapes[shape]
            rows = rows_at_once(self.batch_size, max(held_shape), self.mesh)
            if len(held) >= rows or shape == ordered[-1]:
                batches += [(held_shape, held[low : low + rows]) for low in range(0, len(held), rows)]
                held, held_shape = [], Shape(0, 0)
        return batches

    def _bucket(self, length: int) -> int:
        """The positions of a row for so many tokens."""
        whole = SHORTEST << max(math.ceil(math.log2(length / SHORTEST)), 0)
        return min(whole, self._longest or whole)

    def _packed(self, shape: Shape, places: list[int]) -> Packed:
        """A batch, with empty rows behind if it isn't full."""
        rows = rows_at_once(self.batch_size, max(shape), self.mesh)
        tokens_RW, targets_RW, segments_RW = np.zeros((3, rows, shape.target), np.int32)
        source_RS, source_segments_RS = np.zeros((2, rows, shape.source), np.int32)
        pieces = []
        for row, place in enumerate(places):
            document = self.documents[place]
            target = target_ids(self.store, document)
            source = shortened(source_ids(self.store, document), self._sources_D[place], self.store.sources.eos)
            targets_RW[row, : len(target)] = target
            tokens_RW[row, : len(target)] = np.append(np.int32(self._start), target[:-1])
            segments_RW[row, : len(target)] = 1
            source_RS[row, : len(source)] = source
            source_segments_RS[row, : len(source)] = 1
            pieces.append(Piece(place, 0, len(target), row, 0))
        columns_RW = np.tile(np.arange(shape.target, dtype=np.int32), (rows, 1))
        columns_RS = np.tile(np.arange(shape.source, dtype=np.int32), (rows, 1))
        read = Source(source_RS, source_segments_RS, columns_RS * source_segments_RS)
        weights_RW = segments_RW.astype(np.float32)
        batch = Batch(tokens_RW, targets_RW, weights_RW, segments_RW, columns_RW * segments_RW, read)
        return Packed(batch, columns_RW, pieces)

    def _truncation(self, cut: int, left_out: int) -> str:
        if not cut and not left_out:
            return "none"
        return f"to {self._longest} positions: {cut} sources cut, {left_out} pairs with longer targets left out"


def _lengths(side: Any) -> np.ndarray:
    """Tokens of each document as it is read or scored, EOS included; int64 [D]."""
    return np.diff(side.offsets[:]) - (side.bos is not None)
