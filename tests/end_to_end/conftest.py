"""A text and one finished run that many tests look at and none changes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from . import commands

STEPS = 600


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory, the arguments that made it, and what they printed."""

    workdir: Path
    arguments: list[str]
    result: commands.Result


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> str:
    """The text that the runs are trained on, as a source."""
    return f"text:{commands.write_text(tmp_path_factory.mktemp('text') / 'sentences.txt')}"


@pytest.fixture(scope="session")
def long_run(source):
    """Makes the arguments of a run that is long enough to be stopped on the way."""

    def arguments(workdir: Path) -> list[str]:
        return commands.train(
            source, workdir, training__steps=STEPS, checkpoint__every_steps=100, evaluation__every_steps=300
        )

    return arguments


@pytest.fixture(scope="session")
def finished(long_run, tmp_path_factory) -> Run:
    """The long run, never disturbed, on one device."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    arguments = long_run(workdir)
    return Run(workdir, arguments, commands.succeed(arguments))


def pytest_collection_modifyitems(items):
    """Whole processes: `-m "not slow"` leaves them out."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)
