"""lm-evaluation-harness on our own parameters: the tasks that published models are compared on.

It needs the extra `harness`. A text stands after the model's BOS (else its EOS), as everywhere in lm, so also a
question that is answered or continued.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import lm_eval
import numpy as np
from jax.sharding import Mesh
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from lm.checkpoint import Loaded
from lm.config import InputError
from lm.evaluation.perplexity import check_window
from lm.evaluation.scorer import rows_at_once, score
from lm.evaluation.scores import finite
from lm.evaluation.windows import Window, pack, windows_behind
from lm.fields import nearest
from lm.nn.language_model import model_specs
from lm.parallel import parameter_shardings
from lm.sampling import Sampling
from lm.token_generation import generate_ids

RESAMPLES = 1000
"""Of the bootstrap that some metrics take their standard error from."""
KEPT = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better")
"""What is written of the harness's results; the rest is configuration and samples."""


@register_model("lm")
class HarnessModel(TemplateLM):
    """A model of ours as the harness sees one.

    Requests are packed into rows of few lengths, powers of two, so that one compilation does for most tasks.
    `loglikelihood_rolling` has the windows of `Evaluator` with stride = window, which are the harness's own.

    Args:
      run: with a tokenizer.
      window: the longest input, in tokens; of longer ones the end is kept.
      batch_size: rows, and prompts that are continued together; changes no result.
      mesh: where it computes.
      progress: called with (what is being done, how much of it is done, how much there is).
    """

    def __init__(
        self,
        run: Loaded,
        *,
        window: int,
        batch_size: int,
        mesh: Mesh,
        progress: Callable[[str, int, int], None] | None = None,
    ):
        super().__init__()
        assert run.tokenizer is not None
        check_window(run.config.model, window, window)
        self.run, self.text, self.mesh, self.max_length = run, run.tokenizer, mesh, window
        self.batch_size = batch_size
        self.params = jax.device_put(run.params, parameter_shardings(mesh, model_specs(run.config.model)))
        self.head = [] if self.text.first_id is None else [self.text.first_id]
        self._progress = progress

    @property
    def eot_token_id(self) -> int | None:
        return self.text.eos

    @property
    def prefix_token_id(self) -> int | None:
        return self.text.first_id

    @property
    def tokenizer_name(self) -> str:
        return f"lm-{self.text.sha256}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a string; what stands before a text is put there by the callers."""
        return self.text.encode(string).tolist()

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        before, after = super()._encode_pair(context, continuation)
        return [*self.head, *before], after

    def _loglikelihood_tokens(self, requests: Sequence[tuple], **_: Any) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation in nats, whether greedy decoding gives it) of each request."""
        texts = []
        for _, context, continuation in requests:
            ids = np.array([*(token for token in context if token is not None), *continuation], np.int32)
            ids = ids[-max(self.max_length + 1, len(continuation)) :]
            texts.append((ids, max(len(ids) - len(continuation), 1)))
        found = self._score(texts, "scoring continuations")
        for (request, _, _), result in zip(requests, found, strict=True):
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, result)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in nats."""
        texts = [(np.array([*self.head, *self.tok_encode(each.args[0])], np.int32), 1) for each in requests]
        found = [total for total, _ in self._score(texts, "scoring texts")]
        for request, total in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return found

    def _score(self, texts: Sequence[tuple[np.ndarray, int]], what: str) -> list[tuple[float, bool]]:
        """Of texts, each with so many first ids that aren't scored."""
        inputs = max((len(ids) - 1 for ids, _ in texts), default=0)
        length = min(1 << max(inputs - 1, 31).bit_length(), self.max_length)
        nats, best = np.zeros(len(texts)), np.ones(len(texts), bool)
        rows = rows_at_once(self.batch_size, length, self.mesh)
        packed = pack(self._windows(texts), rows=rows, length=length)
        scored = score(self.params, packed, cfg=self.run.config.model, mesh=self.mesh, greedy=True)
        for pieces, (nats_RW, best_RW) in scored:
            for piece in pieces:
                place = (piece.row, slice(piece.begin, piece.begin + piece.scored))
                nats[piece.text] += nats_RW[place].sum(dtype=np.float64)
                best[piece.text] &= best_RW[place].all()
            self._tell(what, pieces[-1].text + 1, len(texts))
        return list(zip((-nats).tolist(), best.tolist(), strict=True))

    def _windows(self, texts: Sequence[tuple[np.ndarray, int]]) -> Iterator[tuple[int, np.ndarray, Window]]:
        for number, (ids, unscored) in enumerate(texts):
            for window in windows_behind(ids, unscored, window=self.max_length, stride=self.max_length):
                yield number, ids, window

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, cut before the first of the strings in `until`.

        Greedy unless a request says do_sample or a temperature. Of a context that leaves no room the beginning is cut
        off: up to half of the window is kept for it, and as many tokens as are then left are written.
        """
        groups: dict[tuple[int, Sampling], list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[_how_to_write(request.args[1])].append(number)
        found: dict[int, str] = {}
        for (wanted, sampling), numbers in groups.items():
            kept = max(self.max_length - wanted, self.max_length // 2)
            tokens = max(min(wanted, self.max_length - kept), 1)
            prompts = {n: np.array([*self.head, *self.tok_encode(requests[n].args[0])])[-kept:] for n in numbers}
            in_order = sorted(numbers, key=lambda n: len(prompts[n]))
            for start in range(0, len(in_order), self.batch_size):
                some = in_order[start : start + self.batch_size]
                for number, text in zip(
                    some, self._continue([prompts[n] for n in some], tokens, sampling), strict=True
                ):
                    found[number] = _before(text, requests[number].args[1].get("until"))
                self._tell("writing continuations", len(found), len(requests))
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, found[number])
        return [found[number] for number in range(len(requests))]

    def _continue(self, prompts: list[np.ndarray], tokens: int, sampling: Sampling) -> list[str]:
        filled = [*prompts, *[prompts[-1]] * (self.batch_size - len(prompts))]  # the last batch has the others' shape
        ids = generate_ids(
            self.run.params,
            self.run.config.model,
            filled,
            max_tokens=tokens,
            sampling=sampling,
            seed=0,
            end_id=self.text.eos,
        )
        return [self.text.decode(row) for row in ids[: len(prompts)]]

    def _tell(self, what: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(what, done, total)


def evaluate(model: HarnessModel, tasks: Sequence[str], include: str | None = None) -> dict[str, Any]:
    """The harness's results of some tasks, as eval.py writes them under "harness".

    Args:
      include: a folder with task files (YAML) besides the harness's own.

    Raises InputError for a task that isn't there, and for data that can't be had.
    """
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap forks, which JAX's threads may not survive
    manager = TaskManager(include_path=include)
    for task in tasks:
        if not manager.match_tasks([task]):
            raise InputError(
                f"the harness has no task {task!r}{nearest(task, manager.all_tasks)}; "
                "a folder with task files of your own is named by --harness-include"
            )
    try:
        found = lm_eval.simple_evaluate(
            model, tasks=manager.match_tasks(list(tasks)), task_manager=manager, bootstrap_iters=RESAMPLES
        )
    except OSError as error:  # the data of a task: a download, or a file that it names
        raise InputError(f"the data of {', '.join(tasks)} can't be had: {type(error).__name__}: {error}") from error
    return {"lm_eval": lm_eval.__version__, **{name: _plain(found[name]) for name in KEPT if name in found}}


def table(results: dict[str, Any]) -> str:
    """The harness's own table of its results."""
    tables = [make_table(results)] + ([make_table(results, "groups")] if results.get("groups") else [])
    return "\n".join(tables)


def _how_to_write(given: Mapping[str, Any]) -> tuple[int, Sampling]:
    """How many tokens, and how they are chosen, by a task's generation_kwargs under the names that are in use."""
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    tokens = next((int(given[name]) for name in names if given.get(name) is not None), 256)
    temperature = float(given.get("temperature") or 0.0)
    if not given.get("do_sample", temperature > 0):
        return tokens, Sampling(0.0)
    return tokens, Sampling(temperature or 1.0, given.get("top_k") or None, given.get("top_p"))


def _before(text: str, until: str | Iterable[str] | None) -> str:
    for end in [until] if isinstance(until, str) else until or ():
        if end:
            text = text.split(end)[0]
    return text


def _plain(value: Any) -> Any:
    """As JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return finite(value.item() if isinstance(value, np.generic) else value)
