"""A budget on the command line takes the place of the preset's 1000 steps, and the run ends where it says."""

from __future__ import annotations

import math

import pytest

from . import commands

ROWS, CONTEXT, SECONDS = 8, 32, 2.0
BUDGETS = {"tokens": 2000, "epochs": 0.5, "seconds": SECONDS}


@pytest.fixture(scope="module")
def runs(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("budgets")

    def train(name):
        tiny = commands.train(source, folder / name, model__num_layers=1)
        arguments = [*tiny, f"--training.{name}", str(BUDGETS[name])]
        commands.succeed(arguments)
        return folder / name, arguments

    return dict(zip(BUDGETS, commands.at_once(*(lambda name=name: train(name) for name in BUDGETS)), strict=True))


def test_tokens_are_rounded_up_to_whole_steps(runs):
    assert _last_step(runs["tokens"][0]) == math.ceil(2000 / (ROWS * CONTEXT))


def test_epochs_are_passes_over_the_training_text(runs, source):
    characters = len(open(source.removeprefix("text:"), encoding="utf-8").read())  # noqa: SIM115, PTH123
    tokens = characters * 9 // 10 + 2  # a byte a token, the last tenth held out, BOS and EOS
    rows = math.ceil(tokens / CONTEXT)
    assert _last_step(runs["epochs"][0]) == math.ceil(0.5 * rows / ROWS)


def test_seconds_end_the_run_on_time_and_the_schedule_with_it(runs):
    workdir = runs["seconds"][0]
    training = [record for record in commands.records(workdir) if "train/loss" in record]
    assert len(training) == _last_step(workdir) > 1
    # the run ends at the first step after its time; half a second is room for a busy machine
    assert SECONDS - 0.5 < training[-1]["seconds"] < SECONDS + 0.5
    rates = [record["train/learning_rate"] for record in training]
    assert rates[-1] < 0.15 * max(rates), "the cosine has come down to its tenth"


def test_seconds_that_are_used_up_stay_so(runs):
    """Otherwise the same command would train on and on, a step at a time."""
    workdir, arguments = runs["seconds"]
    before = commands.contents(workdir)
    assert "complete" in commands.succeed(arguments).stdout
    assert commands.contents(workdir) == before


def _last_step(workdir) -> int:
    steps = commands.steps(workdir)
    assert [step for step, _ in commands.losses(workdir)] == list(range(1, steps[-1] + 1))
    return steps[-1]
