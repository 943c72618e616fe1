"""Translation and summarisation: a model writes the second sides of pairs from their first, and these are scored."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import heapq
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from lm.checkpoint import Loaded
from lm.config import InputError
from lm.data.corpus import Corpus
from lm.data.sources import holdout
from lm.data.sources.token_files import TokenFiles
from lm.evaluation import bleu, rouge
from lm.evaluation.measured import Measured
from lm.evaluation.writing import Decoding, Progress, Written, check_room, predict, prompts_of
from lm.run_directory import TASK_METRICS

Task = Literal["translation", "summarization"]
EXAMPLES = 5
"""Pairs that are shown, the first by hash of their id."""


class Pair(NamedTuple):
    """A source, and what its translation or summary should be like: one text or several."""

    id: str
    source: str
    references: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class TaskScores:
    """What a model has written for each pair, in their order, and how good that is."""

    task: Task
    measured: Sequence[Measured]
    lead: Sequence[Measured]
    """summarization: the same metrics of each source's first sentence; else none."""
    pairs: Sequence[Pair]
    written: Sequence[Written]
    protocol: Mapping[str, Any]
    seconds: float
    """Of writing, without scoring."""

    def metrics(self) -> dict[str, float]:
        """As in metrics.jsonl."""
        return {f"eval/{each.name}": each.value for each in self.measured}

    def to_dict(self) -> dict[str, Any]:
        """The result as eval.py writes it under "task"."""
        tokens = sum(each.tokens for each in self.written)
        lead = {"lead_sentence": {each.name: each.value for each in self.lead}} if self.lead else {}
        return {
            "name": self.task,
            "metrics": {each.name: each.value for each in self.measured},
            "confidence": {each.name: each.interval and list(each.interval) for each in self.measured},
            **lead,
            "signatures": {each.name: each.signature for each in self.measured},
            "documents": len(self.pairs),
            "references": sum(len(pair.references) for pair in self.pairs),
            "unfinished": sum(not each.ended for each in self.written),
            "cut_sources": sum(each.cut for each in self.written),
            "protocol": dict(self.protocol),
            "tokens": tokens,
            "seconds": self.seconds,
            "tokens_per_second": tokens / self.seconds,
            "examples": [self._record(number) for number in self._first_by_hash()],
        }

    def records(self) -> Iterator[dict[str, Any]]:
        """All pairs in order, with what was written for them."""
        return map(self._record, range(len(self.pairs)))

    def _record(self, number: int) -> dict[str, Any]:
        pair = self.pairs[number]
        return {**pair._asdict(), "references": list(pair.references), "prediction": self.written[number].text}

    def _first_by_hash(self) -> list[int]:
        return heapq.nsmallest(EXAMPLES, range(len(self.pairs)), key=lambda i: _hash(self.pairs[i]))


class TaskEvaluator:
    """Has a model write the second sides of pairs and scores them; call it with a model, as often as that changes.

    Args:
      text: a corpus of pairs.
      pair_separator: what it was opened with.
      documents: take only so many pairs, the first by hash of their id. None: all.

    Raises InputError where the text has no pairs, and where what scores them isn't installed.
    """

    def __init__(
        self,
        task: Task,
        text: Corpus | TokenFiles,
        decoding: Decoding,
        *,
        pair_separator: str,
        documents: int | None = None,
    ):
        check_task(task)
        decoding.validate()
        if not isinstance(text, Corpus):
            raise InputError(
                f"{text.source} holds ids, and {task} is of pairs of texts: name pairs, as in --data pairs:FILE.tsv"
            )
        self.task, self.decoding = task, decoding
        self.pairs = pairs_of(text, pair_separator, documents)
        how = {name: value for name, value in decoding._asdict().items() if name != "batch_size"}
        how["length_penalty"] = decoding.power
        self.protocol = {"task": task, **how, "data": text.source, "data_key": text.key, "documents": documents}

    def check(self, run: Loaded) -> None:
        """Raises InputError where the model, or memory, has no room for what it would have to read and write."""
        check_room(run, prompts_of(run, [pair.source for pair in self.pairs]), self.decoding)

    def __call__(self, run: Loaded, progress: Progress | None = None) -> TaskScores:
        """Writes, then scores.

        Args:
          progress: is told how many texts are written and how many there are.
        """
        sources = [pair.source for pair in self.pairs]
        start = time.perf_counter()
        written = predict(run, sources, self.decoding, progress)
        seconds = time.perf_counter() - start
        measured = self.score([each.text for each in written])
        return TaskScores(self.task, measured, self._lead, self.pairs, written, self.protocol, seconds)

    def score(self, predictions: Sequence[str]) -> list[Measured]:
        """The metrics of a text for each pair."""
        scores = bleu.translation_scores if self.task == "translation" else rouge.summary_scores
        return scores(predictions, [pair.references for pair in self.pairs])

    @functools.cached_property
    def _lead(self) -> Sequence[Measured]:
        """Of summaries what the sources' first sentences score, whatever the model; else nothing."""
        if self.task != "summarization":
            return ()
        return self.score([rouge.lead_sentence(pair.source) for pair in self.pairs])


def check_task(task: Task) -> None:
    """Raises InputError for a task that isn't one of TASK_METRICS, and where what scores it isn't installed."""
    if task not in TASK_METRICS:
        raise InputError(f"the task is {task!r}: use {' or '.join(map(repr, TASK_METRICS))}")
    (bleu if task == "translation" else rouge).check_installed()


def pairs_of(text: Corpus, pair_separator: str, documents: int | None = None) -> list[Pair]:
    """The pairs of a corpus, in its order: all, or so many as are first by hash of their id.

    Raises InputError where it holds anything but pairs.
    """

    def numbered() -> Iterator[tuple[int, Pair]]:
        for number, document in enumerate(text):
            if not document.prompt:
                raise InputError(
                    f"{document.id} in {text.source} is one text, and no pair of a source and what to write for it: "
                    "name pairs, as in pairs:FILE.tsv"
                )
            yield number, Pair(document.id, holdout.name(document, pair_separator), document.references)

    found = numbered() if documents is None else heapq.nsmallest(documents, numbered(), key=lambda x: _hash(x[1]))
    return [pair for _, pair in sorted(found, key=lambda x: x[0])]


def _hash(pair: Pair) -> bytes:
    return hashlib.sha256(pair.id.encode()).digest()
