"""The training loop: per step, evaluate? save? batch, step, log the numbers of the step before."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from lm import allocator
from lm.config import InputError, RunConfig
from lm.data.pipeline import Batch
from lm.evaluation.perplexity import Scores
from lm.run_directory import criterion
from lm.training.budget import Budget
from lm.training.signals import StopRequest, decided
from lm.training.state import TrainState
from lm.training.step import Sums


@dataclasses.dataclass(frozen=True)
class Hands:
    """What the loop is handed; it knows no files, no terminal and no devices."""

    step: Callable[[TrainState, Batch, np.float32], tuple[TrainState, Sums]]
    batches: Iterator[Batch]  # on the devices, from the first step on
    evaluate: Callable[[Any], dict[str, Scores]]  # of each validation text; the first one says what is best
    save: Callable[[int, TrainState, float, dict[str, float]], None]  # step, state, seconds, its evaluation
    write: Callable[[dict[str, Any]], None]  # one record of metrics
    settle: Callable[[], None] = lambda: None  # waits until what was saved is complete
    evaluate_task: Callable[[int, Any], dict[str, float]] = lambda step, params: {}  # translates or summarises


class Clock:
    """Seconds of training, those of earlier starts included."""

    def __init__(self, seconds: float):
        self._begin = time.perf_counter() - seconds

    def seconds(self) -> float:
        return time.perf_counter() - self._begin


def train(
    state: TrainState,
    step: int,
    seconds: float,
    best: float,
    *,
    cfg: RunConfig,
    budget: Budget,
    hands: Hands,
    tokens_per_step: int,
    flops_per_token: float,
    peak_flops: float | None,
    stop: StopRequest,
) -> tuple[TrainState, int, float]:
    """Trains from `step` until the budget is used up or a stop is requested; the state then lies in a checkpoint.

    Args:
      state: after `step` updates and `seconds` of training.
      best: lowest cost of any evaluation so far, by `run_directory.criterion`, infinity for none; a lower one is saved.
      tokens_per_step: in a batch, padding left out.
      peak_flops: of all devices together, FLOP/s; None where it is not known.

    Returns:
      The last state, its step, and the seconds of training.

    Raises InputError, after saving, where more than `training.max_skipped_steps` steps in a row were not finite.
    """
    clock = Clock(seconds)
    log = _Log(cfg, hands.write, tokens_per_step, flops_per_token, peak_flops)
    inline = allocator.computes_inline() and jax.default_backend() == "cpu"
    best_by = criterion(cfg.evaluation)
    saved: int | None = step if step else None
    metrics: dict[str, float] = {}
    while True:
        seconds = decided(clock.seconds(), stop)
        if budget.done(step, seconds) or stop.signal is not None or log.diverged:
            break
        progress = np.float32(budget.progress(step, seconds))
        batch = log.timed(hands.batches)
        state, sums = hands.step(state, batch, progress)
        step += 1
        log.hold(step, sums, clock)
        if inline:
            log.flush(clock)  # it has ended: later, the next step's time would be taken for its own
        metrics = {}
        if _due(step, cfg.evaluation.every_steps):
            log.flush(clock)
            metrics |= summary(hands.evaluate(state.evaluated))
        if _due(step, cfg.evaluation.task_every_steps):
            log.flush(clock)
            metrics |= hands.evaluate_task(step, state.evaluated)
        if metrics:
            hands.write({"step": step, **metrics})
        cost = best_by.cost(metrics)
        better = cost < best  # never where it is NaN
        if better:
            best = cost
        if better or _due(step, cfg.checkpoint.every_steps):
            log.flush(clock)
            hands.save(step, state, clock.seconds(), metrics)
            saved = step
        if saved == step or metrics:
            log.restart_timer()  # tokens a second leave evaluation and saving out
    log.flush(clock)
    jax.block_until_ready(state)
    if saved != step:
        hands.save(step, state, clock.seconds(), metrics)
    if log.diverged:
        hands.settle()
        raise InputError(
            f"diverged: the loss or the gradients of more than {cfg.training.max_skipped_steps} steps in a row are not "
            f"finite. None of these steps changed the weights, which are saved as step {step}. Lower "
            "optimizer.learning_rate or set optimizer.clip_norm, in another --workdir; training.max_skipped_steps "
            "says how many such steps are skipped before a run is given up"
        )
    return state, step, clock.seconds()


def summary(scores: dict[str, Scores]) -> dict[str, float]:
    """An evaluation as metrics: eval/… of the first validation text, and eval/NAME/… of each that has a name."""
    metrics = ("nats_per_token", "perplexity", "bits_per_byte")
    first = next(iter(scores.values()))
    found = {f"eval/{metric}": getattr(first, metric) for metric in metrics}
    for name, each in scores.items():
        if name:
            found |= {f"eval/{name}/{metric}": getattr(each, metric) for metric in metrics}
    return found


class _Log:
    """Holds a step's numbers until the next step is under way, so that the host never waits for what it dispatched."""

    def __init__(
        self,
        cfg: RunConfig,
        write: Callable[[dict[str, Any]], None],
        tokens_per_step: int,
        flops_per_token: float,
        peak: float | None,
    ):
        self.write, self.flops_per_token, self.peak = write, flops_per_token, peak
        self.every_steps, self.max_skipped_steps = cfg.observe.every_steps, cfg.training.max_skipped_steps
        self.has_objective = cfg.training.z_loss is not None or cfg.training.label_smoothing is not None
        self.tokens_per_step = tokens_per_step
        self.held: tuple[int, Sums] | None = None
        self.since = time.perf_counter()
        self.steps_since = 0
        self.waited = 0.0
        self.diverged = False

    def timed(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; how long it took is logged."""
        began = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - began
        return batch

    def hold(self, step: int, sums: Sums, clock: Clock) -> None:
        """Writes what is held, and holds this step instead."""
        self.flush(clock)
        self.held = (step, sums)

    def flush(self, clock: Clock) -> None:
        """Writes the held step, waiting for it to end."""
        if self.held is None:
            return
        step, sums = self.held
        self.held = None
        sums = jax.device_get(sums)
        self.steps_since += 1
        self.diverged |= int(sums.skipped.in_a_row) > self.max_skipped_steps  # a step that is under way may recover
        if not _due(step, self.every_steps):
            return
        elapsed = time.perf_counter() - self.since
        rate = self.steps_since * self.tokens_per_step / elapsed
        tokens = max(float(sums.tokens), 1.0)
        objective = {"train/objective": float(sums.objective) / tokens} if self.has_objective else {}
        self.write(
            {
                "step": step,
                "tokens": step * self.tokens_per_step,
                "seconds": clock.seconds(),
                "train/loss": float(sums.nats) / tokens,
                **objective,
                "train/grad_norm": float(sums.grad_norm),
                "train/skipped": int(sums.skipped.total),
                "train/learning_rate": float(sums.learning_rate),
                "train/tokens_per_second": rate,
                "train/data_seconds": self.waited / self.steps_since,
                "train/mfu": rate * self.flops_per_token / self.peak if self.peak else None,
            }
        )
        self.restart_timer()

    def restart_timer(self) -> None:
        self.since, self.steps_since, self.waited = time.perf_counter(), 0, 0.0


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
