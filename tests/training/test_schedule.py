"""The learning rate at named points of every schedule."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import OptimizerConfig
from lm.training.schedule import learning_rate

PEAK = OptimizerConfig(learning_rate=2.0, warmup_steps=4, final_learning_rate=0.1)


def rate(cfg, step, progress):
    return float(learning_rate(cfg, jnp.int32(step), jnp.float32(progress)))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "inverse_sqrt", "wsd"])
def test_every_schedule_warms_up_linearly(schedule):
    """Update n of the warmup has n / warmup_steps of the peak; without a warmup the first one has all of it."""
    cfg = dataclasses.replace(PEAK, schedule=schedule)
    np.testing.assert_allclose([rate(cfg, n, 0) for n in range(4)], [0.5, 1, 1.5, 2])
    assert rate(dataclasses.replace(cfg, warmup_steps=0), 0, 0) == 2.0


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("cosine", [2, 2 * (0.1 + 0.9 * 0.5), 2 * (0.1 + 0.45 * (1 + math.cos(math.pi * 0.9))), 0.2]),
        ("linear", [2, 1.1, 0.38, 0.2]),
        ("constant", [2, 2, 2, 2]),
        ("wsd", [2, 2, 1.1, 0.2]),
    ],
)
def test_the_decay_follows_the_budget(schedule, wanted):
    cfg = dataclasses.replace(PEAK, schedule=schedule)
    np.testing.assert_allclose([rate(cfg, 99, p) for p in (0, 0.5, 0.9, 1)], wanted, rtol=1e-5)


def test_wsd_stays_at_the_peak_until_its_decay():
    cfg = dataclasses.replace(PEAK, schedule="wsd", decay_fraction=0.4)
    np.testing.assert_allclose([rate(cfg, 99, p) for p in (0.3, 0.6, 0.8)], [2, 2, 1.1], rtol=1e-5)
    cfg = dataclasses.replace(cfg, decay_fraction=1.0)
    np.testing.assert_allclose([rate(cfg, 99, p) for p in (0, 0.5)], [2, 1.1], rtol=1e-5)


def test_inverse_square_root_knows_no_end():
    cfg = dataclasses.replace(PEAK, schedule="inverse_sqrt")
    np.testing.assert_allclose([rate(cfg, n - 1, 1.0) for n in (4, 16, 400)], [2, 1, 0.2], rtol=1e-6)
