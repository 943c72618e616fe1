"""Running a command again: a complete run stays as it is, a longer one goes on, another one is refused."""

from __future__ import annotations

import dataclasses
import re
import shutil

import pytest

from . import commands


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, and the arguments that continue it."""
    workdir = tmp_path / "run"
    shutil.copytree(finished.workdir, workdir)
    arguments = [str(workdir) if part == str(finished.workdir) else part for part in finished.arguments]
    return dataclasses.replace(finished, workdir=workdir, arguments=arguments)


def test_a_complete_run_says_so_and_changes_nothing(finished):
    before = commands.contents(finished.workdir)
    again = commands.succeed(finished.arguments)
    assert "complete" in again.stdout and "training.steps" in again.stdout, "it says how to go on"
    assert "compiled" not in again.stdout
    assert commands.contents(finished.workdir) == before
    numbers = [line for line in finished.result.stdout.splitlines() if "perplexity" in line][-1]
    assert numbers in again.stdout, "the final evaluation is shown again"


def test_more_steps_continue_and_free_fields_may_change(copied):
    free = {"model.scan_layers": True, "evaluation.batch_size": 7, "checkpoint.keep": 1, "observe.every_steps": 2}
    changed = {"training.steps": 620, **free}
    result = commands.succeed([*copied.arguments, *(p for n, v in changed.items() for p in (f"--{n}", str(v)))])
    assert "resuming from step 600" in result.stdout
    for name, value in changed.items():
        assert re.search(rf"changed +{name}: \S+ -> {value}", result.stdout), f"it says that {name} has changed"
    assert "schedule is rebuilt" in result.stdout
    assert [step for step, _ in commands.losses(copied.workdir)] == [*range(1, 601), *range(602, 621, 2)]
    assert max(commands.steps(copied.workdir)) == 620


def test_other_fields_may_not_change(copied):
    before = commands.contents(copied.workdir)
    result = commands.run([*copied.arguments, "--optimizer.learning-rate", "0.25", "--model.num-heads", "4"])
    assert result.status == 2 and "Traceback" not in result.stderr
    assert re.search(r"optimizer\.learning_rate: 0\.003 .*0\.25", result.message)
    assert re.search(r"model\.num_heads: 2 .*4", result.message)
    assert "--workdir" in result.message and "compiled" not in result.stdout
    assert commands.contents(copied.workdir) == before


def test_fewer_steps_are_refused(copied):
    """The schedule that the run has followed would not have been the one of the shorter run."""
    before = commands.contents(copied.workdir)
    result = commands.run([*copied.arguments, "--training.steps", "300"])
    assert result.status == 2 and re.search(r"training\.steps: 600 .*300", result.message)
    assert commands.contents(copied.workdir) == before


def test_another_text_under_the_same_path_is_refused(source, tmp_path):
    file = commands.write_text(tmp_path / "text.txt", sentences=300)
    arguments = commands.train(f"text:{file}", tmp_path / "run", training__steps=3)
    commands.succeed(arguments)
    commands.write_text(file, sentences=300, seed=1)
    before = commands.contents(tmp_path / "run")
    result = commands.run([*arguments, "--training.steps", "6"])
    assert result.status == 2 and "Traceback" not in result.stderr
    assert "training text" in result.message and "--workdir" in result.message
    assert commands.contents(tmp_path / "run") == before
