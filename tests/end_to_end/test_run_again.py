"""Running a command again: a complete run stays as it is, a longer one goes on, another one is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import time

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
    assert "compiled" not in again.stdout and "allocator" not in again.stdout
    assert commands.contents(finished.workdir) == before
    numbers = [line for line in finished.result.stdout.splitlines() if "perplexity" in line][-1]
    assert numbers in again.stdout, "the final evaluation is shown again"


def test_more_steps_continue_and_free_fields_may_change(copied):
    free = {"model.scan_layers": True, "evaluation.batch_size": 7, "checkpoint.keep": 1, "observe.every_steps": 2}
    changed = {"training.steps": 620, **free}
    given = (part for name, value in changed.items() for part in (f"--{name}", str(value)))
    result = commands.succeed([*copied.arguments, "--model.attention", "reference", *given])
    assert "resuming from step 600" in result.stdout
    for name, value in changed.items():
        assert re.search(rf"changed +{name}: \S+ -> {value}", result.stdout), f"it says that {name} has changed"
    assert "schedule is rebuilt" in result.stdout
    assert re.search(r"changed +model.attention: 'auto' -> 'reference'", result.stdout)
    assert re.search(r"attention +reference: dropout .* 32 tokens", copied.result.stdout)  # picked, and said
    assert re.search(r"attention +reference: model.attention says so", result.stdout)
    assert [step for step, _ in commands.losses(copied.workdir)] == [*range(1, 601), *range(602, 621, 2)]
    assert max(commands.steps(copied.workdir)) == 620


def test_another_protocol_evaluates_a_complete_run_anew(copied):
    """The number shown must be the one that was asked for, not one of an earlier protocol."""
    again = commands.succeed([*copied.arguments, "--evaluation.window", "16", "--evaluation.stride", "4"])
    result = json.loads((copied.workdir / "eval.json").read_text(encoding="utf-8"))
    assert (result["protocol"]["window"], result["protocol"]["stride"]) == (16, 4)
    assert f"{result['perplexity']:.3f}" in again.stdout
    assert "compiled   the training step" not in again.stdout, "nothing was trained"


def test_a_second_trainer_in_the_same_directory_is_refused(long_run, tmp_path):
    """Two would delete each other's unfinished checkpoints and mix their metrics."""
    arguments = long_run(tmp_path / "run")
    first = commands.start([*arguments, "--training.steps", "2000"])
    try:
        while not commands.losses(tmp_path / "run"):
            assert first.poll() is None, commands.finish(first)
            time.sleep(0.01)
        second = commands.run([*arguments, "--training.steps", "2000"])
        still_running = first.poll() is None
    finally:
        first.terminate()
        stopped = commands.finish(first)
    assert still_running, "the first had already ended: nothing was tested"
    assert second.status == 2 and "--workdir" in second.message, f"{second.stdout}{second.stderr}"
    assert stopped.status == 143, stopped.stderr


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
