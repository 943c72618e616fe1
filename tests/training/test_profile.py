"""A profiler's trace of a run: which steps are in it, that it is written, and that it changes no number."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lm.parallel import put_rows
from lm.training import profile

from .ten_steps import batch_at, compiled, run_config


def test_a_trace_is_written_and_no_number_changes(tmp_path, one_device):
    step, state = compiled(run_config("bare"), one_device)
    plain, said = state, []
    with profile.traced(step, tmp_path, said.append) as traced:
        for n in range(10):
            batch = put_rows(one_device, batch_at(n))
            plain, _ = step(plain, batch, np.float32(0))
            state, _ = traced(state, batch, np.float32(0))
            assert len(said) == (2 if n + 1 >= 8 else 0)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert "5 steps" in said[0] and str(tmp_path / "profile") in said[1]
    same = jax.tree.map(lambda a, b: bool((a == b).all()), state, plain)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("steps, traced_steps", [(2, None), (3, None), (5, 2)])
def test_a_run_that_ends_early_says_what_is_there(tmp_path, monkeypatch, steps, traced_steps):
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    said: list[str] = []
    with profile.traced(lambda state: state + 1, tmp_path, said.append) as traced:
        state = np.float32(0)
        for _ in range(steps):
            state = traced(state)
    assert state == steps
    assert f"{traced_steps} steps" in said[0] if traced_steps else f"ended with its step {steps}" in said[0]


def test_a_run_that_fails_stops_the_trace(tmp_path, monkeypatch):
    stopped: list[bool] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: stopped.append(True))
    with pytest.raises(KeyError), profile.traced(lambda state: state, tmp_path, lambda line: None) as traced:
        for _ in range(5):
            traced(0)
        raise KeyError
    assert stopped == [True]
