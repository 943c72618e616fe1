"""Budgets: steps, tokens and epochs become steps; seconds end by the clock."""

from __future__ import annotations

import dataclasses
import os
import signal

import pytest

from lm.config import TrainingConfig
from lm.training.budget import Budget
from lm.training.flops import flops_per_token, peak_flops
from lm.training.signals import StopRequest

from .ten_steps import run_config


def budget(**given) -> Budget:
    cfg = TrainingConfig(**{"steps": None, "batch_size": 8, **given})
    return Budget.of(cfg, warmup_steps=10, tokens_per_step=128, rows_per_epoch=20)


@pytest.mark.parametrize(
    ("given", "steps"),
    [({"steps": 7}, 7), ({"tokens": 129}, 2), ({"tokens": 128}, 1), ({"epochs": 1.0}, 3), ({"epochs": 2.0}, 5)],
)
def test_counted_budgets_round_up_to_steps(given, steps):
    b = budget(**given)
    assert b.steps == steps
    assert b.done(steps, 0.0) and not b.done(steps - 1, 1e9)


def test_progress_counts_from_the_end_of_the_warmup():
    b = budget(steps=110)
    assert [b.progress(n, 0) for n in (0, 10, 60, 110, 200)] == [0, 0, 0.5, 1, 1]
    assert budget(steps=5).progress(4, 0) == 0, "a run shorter than its warmup never decays"
    b = budget(seconds=4.0)
    assert [b.progress(3, s) for s in (0, 1, 4, 9)] == [0, 0.25, 1, 1]
    assert b.done(0, 4.0) and not b.done(10**9, 3.9)


def test_a_signal_is_noted_and_a_second_interrupt_is_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert stop.noted is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.noted == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_flops_by_hand():
    cfg = run_config("gpt2").model  # 2 layers of width 32: attention 4·32², feed-forward 8·32², head 64 x 32
    matrices = 2 * 12 * 32 * 32 + 64 * 32
    assert flops_per_token(cfg, context=24) == 6 * matrices + 12 * 2 * 32 * 24
    untied = dataclasses.replace(cfg, tie_embeddings=False)
    assert flops_per_token(untied, context=24) == flops_per_token(cfg, context=24)
    windows = dataclasses.replace(cfg, window=(10, None))
    assert flops_per_token(windows, context=24) == 6 * matrices + 12 * 32 * (10 + 24)
    assert flops_per_token(windows, context=8) == flops_per_token(cfg, context=8)


def test_peaks_of_known_devices():
    class Device:
        device_kind = "NVIDIA H100 80GB HBM3"

    assert peak_flops(Device()) == 989e12
    Device.device_kind = "cpu"
    assert peak_flops(Device()) is None


def test_flops_of_an_encoder_by_hand():
    """bart: 3 decoder layers of width 32 and 2 of the encoder; a row has 24 targets and 12 ids of a source."""
    cfg = run_config("bart").model
    square, rows = 32 * 32, 12 / 24
    decoder = 3 * (12 * square + 2 * square)  # self-attention and feed-forward; q and out of cross-attention
    matrices = decoder + 64 * 32 + rows * (3 * 2 * square + 2 * 12 * square)
    keys = 3 * 24 + 3 * 12 + rows * 2 * 12
    assert flops_per_token(cfg, 24, 12) == 6 * matrices + 12 * 32 * keys
    assert flops_per_token(cfg, 24) == flops_per_token(cfg, 24, 24)
