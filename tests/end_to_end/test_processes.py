"""Real processes on this machine, each with a device of its own: one curve, one log, one end for all of them."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from lm.processes import watch
from tests.gloo import without_gloo

from . import commands

STEPS, HALF = 10, 5
# Compiling is most of the time here, and the numbers only have to be the same as each other.
QUICKLY = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
RUNS = {
    "1": (1, {}),
    "2 data": (2, {}),
    "2 fsdp": (2, {"parallel__fsdp": 2}),
    "2 pmap": (2, {"parallel__strategy": "pmap"}),
    "4 data, fsdp": (4, {"parallel__fsdp": 2}),
    "4 pmap": (4, {"parallel__strategy": "pmap"}),
}


def arguments(source, workdir, **changes) -> list[str]:
    fields = {"training__steps": STEPS, "checkpoint__every_steps": HALF, "observe__sample_prompt": "the", **changes}
    return commands.train(source, workdir, model__num_layers=1, **fields)


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> str:
    return f"text:{commands.write_text(tmp_path_factory.mktemp('text') / 'short.txt', sentences=300)}"


@pytest.fixture(scope="module")
def curves(short, tmp_path_factory):
    """{name: (run directory, what the command printed)} of RUNS."""
    folder = tmp_path_factory.mktemp("curves")

    def run(name):
        processes, changes = RUNS[name]
        workdir = folder / name.replace(" ", "_").replace(",", "")
        command = arguments(short, workdir, **changes)
        return workdir, commands.succeed(commands.launched(command, processes), **QUICKLY)

    return dict(zip(RUNS, commands.at_once(*(lambda name=name: run(name) for name in RUNS)), strict=True))


@pytest.mark.parametrize("name", [name for name in RUNS if name != "1"])
def test_losses_and_evaluation_are_those_of_one_process(curves, name):
    (alone, _), (workdir, _) = curves["1"], curves[name]
    assert_same_curve(workdir, alone)
    ours, theirs = (json.loads((run / "eval.json").read_text()) for run in (workdir, alone))
    assert ours["tokens"] == theirs["tokens"] and ours["documents"] == theirs["documents"]
    assert ours["nats_per_token"] == pytest.approx(theirs["nats_per_token"], rel=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_each_line_is_written_once_and_by_the_first_process(curves, name):
    workdir, result = curves[name]
    assert [step for step, _ in commands.losses(workdir)] == list(range(1, STEPS + 1))
    assert len([record for record in commands.records(workdir) if "start" in record]) == 1
    assert commands.steps(workdir) == [HALF, STEPS]
    for word in ("starting ", "validation perplexity", "saved ", "sample "):
        assert len(re.findall(word, result.stdout)) == 1, result.stdout
    assert "process 1: " not in without_gloo(result.stderr, r"process \d: "), result.stderr


@pytest.mark.parametrize(
    "first, processes, changes",
    [("2 data", 4, {"parallel__fsdp": 2}), ("2 data", 1, {}), ("2 fsdp", 4, {"parallel__fsdp": 4}), ("2 fsdp", 1, {})],
)
def test_two_processes_are_continued_by_another_number(curves, short, tmp_path, first, processes, changes):
    workdir = tmp_path / "run"
    shutil.copytree(curves[first][0], workdir)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    (workdir / "eval.json").unlink()
    command = arguments(short, workdir, **changes)
    result = commands.succeed(commands.launched(command, processes), **QUICKLY)
    assert f"resuming from step {HALF}" in result.stdout
    assert_same_curve(workdir, curves["1"][0])


# Each process has its arguments, and whatever differs is found before anything is trained.
DIFFERENT = {
    "config": (
        {"optimizer__learning_rate": 1e-3},
        {},
        r"optimizer\.learning_rate: 0.003 on process 0, 0.001 on process 1",
    ),
    "environment": ({}, {"JAX_ENABLE_X64": "0"}, r"JAX_ENABLE_X64: None on process 0, '0' on process 1"),
    "what one finds": ({}, {"LM_CACHE": "/dev/null/cache"}, r"process 1: no folder can be made at /dev/null/cache"),
}


@pytest.fixture(scope="module")
def different(short, tmp_path_factory):
    folder = tmp_path_factory.mktemp("different")

    def run(name):
        changes, environment, _ = DIFFERENT[name]
        workdir = folder / name.replace(" ", "_")
        started = time.monotonic()
        processes = commands.start_each(
            arguments(short, workdir),
            arguments(short, workdir, **changes),
            environments=[QUICKLY, QUICKLY | environment],
        )
        results = [commands.finish(process) for process in processes]
        return workdir, results, time.monotonic() - started

    return dict(zip(DIFFERENT, commands.at_once(*(lambda name=name: run(name) for name in DIFFERENT)), strict=True))


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_ends_all_with_one_message(different, name):
    workdir, (first, second), seconds = different[name]
    assert first.status == second.status == 2, (first, second)
    assert re.search(DIFFERENT[name][2], first.message), first
    assert first.stderr.count("error: ") == 1 and "error: " not in second.stderr, (first, second)
    assert "Traceback" not in first.stderr + second.stderr
    assert not workdir.exists()
    assert seconds < 60


@dataclasses.dataclass(frozen=True)
class Stopped:
    """A run of two processes of which one got a signal: how each ended, and how long after it."""

    workdir: Path
    command: list[str]
    results: list[commands.Result]
    seconds: float


@pytest.fixture(scope="module")
def stopped(short, tmp_path_factory):
    """{(signal, process): Stopped}."""
    folder = tmp_path_factory.mktemp("stopped")

    def stop(number, index):
        workdir = folder / f"{number.name}_{index}"
        command = arguments(short, workdir, training__steps=100_000, checkpoint__every_steps=20)
        processes = commands.start_each(command, command, environments=[QUICKLY, QUICKLY])
        try:
            until = time.monotonic() + commands.TIMEOUT_SECONDS
            while len(commands.steps(workdir)) < 2:
                assert all(each.poll() is None for each in processes) and time.monotonic() < until
                time.sleep(0.05)
            processes[index].send_signal(number)
            began = time.monotonic()
            results = [commands.finish(process) for process in processes]
            return Stopped(workdir, command, results, time.monotonic() - began)
        finally:
            for process in processes:
                process.kill()

    cases = [(signal.SIGTERM, 1), (signal.SIGKILL, 1), (signal.SIGKILL, 0)]
    return dict(zip(cases, commands.at_once(*(lambda case=case: stop(*case) for case in cases)), strict=True))


@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_raises_ends_all_with_its_traceback(short, tmp_path, failing):
    command = arguments(short, tmp_path / "run", training__steps=100_000)
    own = {"LM_TEST_FAILING": str(failing)}
    processes = commands.start_each(*[["-m", "tests.end_to_end.raising", *command[1:]]] * 2, environments=[own, own])
    began = time.monotonic()
    results = [commands.finish(process) for process in processes]
    assert [result.status for result in results] == [1, 1], results
    said, other = results[failing].stderr, without_gloo(results[1 - failing].stderr)
    assert "Traceback" in said and "RuntimeError: step 3 of the test" in said
    assert other == ("error: process 1: RuntimeError: step 3 of the test\n" if failing else "")
    assert time.monotonic() - began < 90


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_makes_the_others_stop_with_a_message(stopped, killed):
    run = stopped[signal.SIGKILL, killed]
    left = run.results[1 - killed]
    assert run.results[killed].status == -signal.SIGKILL and left.status == watch.LOST_STATUS, run.results
    assert run.seconds < watch.LOST_SECONDS + 10
    last = commands.steps(run.workdir)[-1]
    said = rf"error: process {killed} is gone.*\. The last checkpoint is of step {last}, in {run.workdir}; the same "
    assert len(re.findall(said, left.stderr)) == 1, left.stderr
    assert "Traceback" not in left.stderr


def test_a_process_killed_while_it_saves_makes_the_others_stop_with_a_message(short, tmp_path):
    """The other waits for it within Orbax, whose thread gets the error, and tells of it as of a timeout."""
    workdir = tmp_path / "run"
    command = arguments(short, workdir)
    own = QUICKLY | {"LM_TEST_KILLED": str(STEPS)}
    killing = ["-m", "tests.end_to_end.killed_while_saving", *command[1:]]
    killed, left = (commands.finish(each) for each in commands.start_each(killing, killing, environments=[own, own]))
    assert killed.status == -signal.SIGKILL and left.status == watch.LOST_STATUS, (killed, left)
    assert len(re.findall(rf"error: process 0 is gone.*\. The last checkpoint is of step {HALF}, ", left.stderr)) == 1
    assert "Traceback" not in left.stderr
    assert commands.steps(workdir) == [HALF]


def test_the_same_command_continues_after_a_kill_also_in_one_process(stopped):
    run = stopped[signal.SIGKILL, 1]
    last = commands.steps(run.workdir)[-1]

    def goes_on() -> bool:
        again = len([record for record in commands.records(run.workdir) if "start" in record]) > 1
        return again and commands.losses(run.workdir)[-1][0] > last

    result = commands.stop_after(run.command, signal.SIGTERM, goes_on, **QUICKLY)
    assert result.status == 143 and f"resuming from step {last}" in result.stdout, result
    steps = [step for step, _ in commands.losses(run.workdir)]
    assert steps == list(range(1, len(steps) + 1))


def test_sigterm_to_one_process_makes_all_save_the_same_step(stopped):
    run = stopped[signal.SIGTERM, 1]
    assert [result.status for result in run.results] == [143, 143], run.results
    assert run.results[0].stdout.count("stopped    by SIGTERM; saved in") == 1
    assert without_gloo(run.results[1].stdout).strip() == ""
    assert commands.steps(run.workdir)[-1] == commands.losses(run.workdir)[-1][0]
    assert run.seconds < 20


def assert_same_curve(workdir: Path, alone: Path) -> None:
    ours, theirs = commands.losses(workdir), commands.losses(alone)
    assert [step for step, _ in ours] == [step for step, _ in theirs] == list(range(1, STEPS + 1))
    for (step, loss), (_, wanted) in zip(ours, theirs, strict=True):
        assert loss == pytest.approx(wanted, rel=1e-5), f"step {step}"  # float32, summed in another order
