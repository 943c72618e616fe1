"""The loop: it never waits for the step that it has just dispatched, and moves nothing unasked."""

from __future__ import annotations

import itertools
import threading

import jax
import numpy as np
import pytest

from lm.config import InputError, RunConfig, TrainingConfig
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
