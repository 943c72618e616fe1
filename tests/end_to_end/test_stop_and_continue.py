"""A run that is stopped and continued by the same command is the run that never stopped, bit for bit."""

from __future__ import annotations

import re
import signal

import jax
import numpy as np
import pytest

from lm import arrays

from . import commands
from .conftest import STEPS

STOPS = {"SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL, "SIGINT": signal.SIGINT}


@pytest.fixture(scope="module")
def stopped(long_run, finished, tmp_path_factory):
    """{signal: (run directory, the stopped start, its checkpoints, its losses, the start that continued it)}."""
    folder = tmp_path_factory.mktemp("stopped")

    def stop_and_continue(name):
        workdir = folder / name
        # an evaluation and several periodic checkpoints lie behind, and nearly half of the run ahead
        early = commands.stop_after(
            long_run(workdir), STOPS[name], lambda: bool(commands.steps(workdir)) and _last_step(workdir) >= 320
        )
        before = commands.steps(workdir), commands.losses(workdir)
        # once with a step that is compiled anew, so that equality doesn't hang on sharing one compilation
        cache = "false" if name == "SIGTERM" else "true"
        late = commands.succeed(long_run(workdir), JAX_ENABLE_COMPILATION_CACHE=cache) if name != "SIGINT" else None
        return workdir, early, *before, late

    found = commands.at_once(*(lambda name=name: stop_and_continue(name) for name in STOPS))
    return dict(zip(STOPS, found, strict=True))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_the_step_that_was_reached_and_says_where(stopped, name):
    workdir, early, steps, losses, _ = stopped[name]
    assert early.status == 128 + STOPS[name]
    said = re.search(rf"stopped +by {name}; saved in (\S+); the same command continues", early.stdout)
    assert said and said[1] == str(workdir), early.stdout
    assert "Traceback" not in early.stderr
    assert max(steps) == losses[-1][0] < STEPS, "the last step that was logged is the one that was saved"


def test_sigkill_leaves_the_last_periodic_checkpoint(stopped):
    _, early, steps, losses, _ = stopped["SIGKILL"]
    assert early.status == -signal.SIGKILL
    assert losses[-1][0] < STEPS
    assert all(step % 100 == 0 for step in steps), "nothing but periodic checkpoints was there to continue from"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_the_same_command_resumes_where_the_checkpoint_is(stopped, name):
    workdir, _, steps, _, late = stopped[name]
    said = re.search(r"resuming from step (\d+)", late.stdout)
    assert said and int(said[1]) == max(steps) > 0, late.stdout
    starts = [record["start"]["resumed_from"] for record in commands.records(workdir) if "start" in record]
    assert starts == [None, max(steps)]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_losses_are_those_of_the_undisturbed_run_each_step_once(stopped, finished, name):
    workdir = stopped[name][0]
    assert [step for step, _ in commands.losses(workdir)] == list(range(1, STEPS + 1))
    assert commands.losses(workdir) == commands.losses(finished.workdir)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_evaluations_are_those_of_the_undisturbed_run_each_once(stopped, finished, name):
    assert [record["step"] for record in commands.evaluations(finished.workdir)] == [300, 600]
    assert commands.evaluations(stopped[name][0]) == commands.evaluations(finished.workdir)


@pytest.mark.parametrize("item", ["params", "opt_state"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_arrays_are_those_of_the_undisturbed_run_bit_for_bit(stopped, finished, name, item):
    ours, theirs = (
        jax.tree.map(np.asarray, arrays.read_all(run / "checkpoints" / str(STEPS) / item, dtype=None))
        for run in (stopped[name][0], finished.workdir)
    )
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert len(jax.tree.leaves(ours)) > 10
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()


def _last_step(workdir) -> int:
    losses = commands.losses(workdir)
    return losses[-1][0] if losses else 0
