"""The loop: it never waits for the step that it has just dispatched, and moves nothing unasked."""

from __future__ import annotations

import itertools
import math
import threading
import time

import jax
import numpy as np
import pytest

from lm import allocator, checkpoint
from lm.checkpoint import CheckpointWriter
from lm.config import EvaluationConfig, InputError, ObserveConfig, RunConfig, TrainingConfig
from lm.evaluation.perplexity import Scores
from lm.training import loop, transfers
from lm.training.budget import Budget
from lm.training.signals import StopRequest
from lm.training.state import Skipped, TrainState
from lm.training.step import Sums

STEPS = 4


class Held:
    """A number of a step that is there only once the next step has been dispatched."""

    def __init__(self, value):
        self.value, self.there = value, threading.Event()

    def __array__(self, dtype=None, copy=None):
        assert self.there.wait(5), "the loop waits for a step before it dispatches the next"
        return np.asarray(self.value, dtype)


def train(step, written):
    cfg = RunConfig(training=TrainingConfig(steps=STEPS))
    budget = Budget.of(cfg.training, warmup_steps=0, tokens_per_step=1, rows_per_epoch=1)
    hands = loop.Hands(step, itertools.repeat(None), lambda params: {}, lambda *_: None, written.append)
    state = TrainState(np.int32(0), {}, ())
    loop.train(
        state, 0, 0.0, 0.0, cfg=cfg, budget=budget, hands=hands, tokens_per_step=1, flops_per_token=1.0,
        peak_flops=None, stop=StopRequest(),
    )  # fmt: skip


def test_the_next_step_is_dispatched_before_the_numbers_of_the_last_are_there():
    held, written = [], []

    def step(state, batch, progress):
        if held:
            assert not held[-1].there.is_set()
            held[-1].there.set()
        held.append(Held(len(held) + 1.0))
        if len(held) == STEPS:
            held[-1].there.set()  # there is no other step to wait for
        one, none = np.float32(1), np.int32(0)
        numbers = dict.fromkeys(Sums._fields, one) | {"nats": held[-1], "skipped": Skipped(none, none)}
        return state, Sums(**numbers)

    train(step, written)
    assert [record["train/loss"] for record in written] == [1.0, 2.0, 3.0, 4.0]


def test_a_run_that_is_given_up_is_so_though_the_step_under_way_recovers():
    counts = iter([0, 11, 0, 0])  # more than max_skipped_steps in a row by the second step

    def step(state, batch, progress):
        one = np.float32(1)
        numbers = dict.fromkeys(Sums._fields, one) | {"skipped": Skipped(np.int32(11), np.int32(next(counts)))}
        return state, Sums(**numbers)

    with pytest.raises(InputError, match="diverged: .* more than 10 steps in a row"):
        train(step, [])


def one_step(state, batch, progress):
    numbers = dict.fromkeys(Sums._fields, np.float32(1)) | {"skipped": Skipped(np.int32(0), np.int32(0))}
    return state, Sums(**numbers)


@pytest.mark.parametrize(("best", "step"), [("nats", 1), ("task", 3)])
def test_the_best_checkpoint_is_chosen_by_what_the_config_says(tmp_path, best, step):
    """The nats rise from the first step on, while BLEU rises to the third and falls again."""
    how = EvaluationConfig(every_steps=1, task="translation", task_every_steps=1, best=best)
    cfg = RunConfig(training=TrainingConfig(steps=STEPS), evaluation=how)
    nats, bleu = iter([1.0, 1.1, 1.2, 1.3]), iter([10.0, 20.0, 30.0, 5.0])
    written, saved = [], []
    with CheckpointWriter(tmp_path, config=cfg, save_tokenizer=None, provenance={}, keep=1) as writer:

        def save(number, state, seconds, metrics):
            saved.append(number)
            writer.save(number, {"params": {"w": np.zeros(1)}}, metrics)

        hands = loop.Hands(
            one_step,
            itertools.repeat(None),
            lambda params: {"": Scores(next(nats), 1, 1, 1, 1, None, {}, 1.0)},
            save,
            written.append,
            evaluate_task=lambda step, params: {"eval/bleu": next(bleu)},
        )
        loop.train(
            TrainState(np.int32(0), {}, ()), 0, 0.0, math.inf, cfg=cfg, hands=hands, tokens_per_step=1,
            budget=Budget.of(cfg.training, warmup_steps=0, tokens_per_step=1, rows_per_epoch=1), flops_per_token=1.0,
            peak_flops=None, stop=StopRequest(),
        )  # fmt: skip
    assert saved == ([1, 4] if best == "nats" else [1, 2, 3, 4])
    assert checkpoint.best_step(tmp_path) == step
    assert checkpoint.steps(tmp_path) == [step, 4]  # the best stays beside the newest
    evaluations = [record for record in written if "eval/bleu" in record]
    assert [(each["step"], each["eval/nats_per_token"], each["eval/bleu"]) for each in evaluations] == [
        (1, 1.0, 10.0), (2, 1.1, 20.0), (3, 1.2, 30.0), (4, 1.3, 5.0)
    ]  # fmt: skip


def test_writing_texts_is_time_of_training_but_not_of_its_speed():
    cfg = RunConfig(
        training=TrainingConfig(steps=3), evaluation=EvaluationConfig(task="translation", task_every_steps=2)
    )
    written = []

    def write_texts(step, params):
        time.sleep(0.5)
        return {"eval/bleu": 1.0}

    hands = loop.Hands(
        one_step, itertools.repeat(None), lambda params: {}, lambda *_: None, written.append, evaluate_task=write_texts
    )
    loop.train(
        TrainState(np.int32(0), {}, ()), 0, 0.0, math.inf, cfg=cfg, hands=hands, tokens_per_step=100,
        budget=Budget.of(cfg.training, warmup_steps=0, tokens_per_step=100, rows_per_epoch=1), flops_per_token=1.0,
        peak_flops=None, stop=StopRequest(),
    )  # fmt: skip
    last = written[-1]
    assert last["step"] == 3 and last["seconds"] > 0.5 and last["train/tokens_per_second"] > 1000


def test_speed_where_a_call_returns_once_it_is_computed(monkeypatch):
    """The last step's time isn't taken for that of the one before."""
    monkeypatch.setattr(allocator, "computes_inline", lambda: True)
    cfg = RunConfig(training=TrainingConfig(steps=4), observe=ObserveConfig(every_steps=1))
    written = []

    def slow_step(state, batch, progress):
        time.sleep(0.1)
        return one_step(state, batch, progress)

    hands = loop.Hands(slow_step, itertools.repeat(None), lambda params: {}, lambda *_: None, written.append)
    loop.train(
        TrainState(np.int32(0), {}, ()), 0, 0.0, math.inf, cfg=cfg, hands=hands, tokens_per_step=100,
        budget=Budget.of(cfg.training, warmup_steps=0, tokens_per_step=100, rows_per_epoch=1), flops_per_token=1.0,
        peak_flops=None, stop=StopRequest(),
    )  # fmt: skip
    assert [record["step"] for record in written] == [1, 2, 3, 4]
    assert all(500 < record["train/tokens_per_second"] < 1001 for record in written), written


@pytest.fixture
def compiled(one_device):
    everywhere = jax.ShapeDtypeStruct((), np.float32, sharding=transfers.replicated(one_device))
    return jax.jit(lambda state, batch, progress: state + progress).lower(everywhere, None, everywhere).compile()


def test_a_transfer_that_nobody_asked_for_raises(compiled, one_device):
    state = jax.device_put(np.float32(1), transfers.replicated(one_device))
    with transfers.none_hidden(one_device):
        with pytest.raises(Exception, match="[Dd]isallowed host-to-device transfer"):
            compiled(state, None, np.float32(2))
        assert float(transfers.placing_progress(compiled, one_device)(state, None, np.float32(2))) == 3
        assert float(transfers.freely(compiled)(state, None, np.float32(2))) == 3
