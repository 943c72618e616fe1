"""Sides in processes of their own that take turns: only one computes at a time, and each has its own allocator."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from rich.console import Console

ROOT = Path(__file__).parents[1]


class SideFailed(RuntimeError):
    """A side's process ended; the message is the last that it said."""


class Turns(NamedTuple):
    """How many each side has, and how long one takes: at least a step."""

    rounds: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Entry:
    """A side: its name for the reader, the module of its process, what that is told, and its environment."""

    name: str
    module: str
    spec: dict[str, Any]
    environment: dict[str, str]


class Worker:
    """The process of a side, warm and waiting. `facts` is what it says of itself, `turns` the seconds a step of each
    turn so far, `last` its last answer."""

    def __init__(self, entry: Entry):
        self.entry, self.turns, self.last = entry, list[float](), dict[str, Any]()
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        path = [str(ROOT), *filter(None, [entry.environment.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", entry.module, json.dumps(entry.spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**entry.environment, "PYTHONPATH": ":".join(path)},
        )
        try:
            self.facts = self._answer()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None or self._process.poll() is not None:
            self._process.kill()
        self._process.communicate()  # it ends with its input
        self._log.close()

    def steps(self, number: int) -> float:
        """Seconds that so many steps take."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the missing answer says why
            print(number, file=self._process.stdin, flush=True)
        self.last = self._answer()
        return self.last["seconds"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._log.seek(0)
        said = [line for line in self._log.read().splitlines() if line.strip()]
        raise SideFailed(said[-1] if said else f"ended with status {self._process.returncode}")


def alternate(workers: Sequence[Worker], turns: Turns) -> None:
    """Each side in turn does as many steps as take about `turns.seconds`; what they took is added to its `turns`."""
    steps = [max(1, math.ceil(turns.seconds / worker.steps(1))) for worker in workers]
    for _ in range(turns.rounds):
        for worker, number in zip(workers, steps, strict=True):
            worker.turns.append(worker.steps(number) / number)


def ratio(ours: Worker, theirs: Worker, rounds: int) -> float:
    """How many times as fast ours is: the median over the last rounds, of the turns one after the other."""
    pairs = zip(ours.turns[-rounds:], theirs.turns[-rounds:], strict=True)
    return statistics.median(their / our for our, their in pairs)


def beside(
    ours: Sequence[Entry], theirs: Sequence[Entry], console: Console, where: str, turns: Turns
) -> Iterator[dict[str, Any]]:
    """Each of theirs in turns with all of ours, one at a time: a row for each side, and one for each pair of sides.

    A side that fails is a row with its "error", and the others go on.
    """
    with contextlib.ExitStack() as held:
        workers = []
        for entry in ours:
            console.print(f"{where}: starting {entry.name}", highlight=False)
            try:
                workers.append(held.enter_context(Worker(entry)))
            except SideFailed as failure:
                yield {"side": entry.name, "error": str(failure)}
        for entry in theirs:
            console.print(f"{where}: {entry.name}", highlight=False)
            try:
                with Worker(entry) as peer:
                    alternate([*workers, peer], turns)
            except SideFailed as failure:
                yield {"side": entry.name, "error": str(failure)}
                continue
            for worker in workers:
                yield {"ours": worker.entry.name, "theirs": entry.name, "ratio": ratio(worker, peer, turns.rounds)}
            yield _row(peer)
        if not theirs:
            alternate(workers, turns)
        yield from (_row(worker) for worker in workers if worker.turns)


def _row(worker: Worker) -> dict[str, Any]:
    """What was seen of a side."""
    return {
        "side": worker.entry.name,
        "seconds_a_step": statistics.median(worker.turns),
        "turns": worker.turns,
        **worker.facts,
        **{name: worker.last[name] for name in ("peak_bytes", "device_peak_bytes")},
    }


def check_ours(found: dict[str, Any]) -> None:
    """Raises SideFailed where one of ours did: a peer may, ours may not."""
    for side in found["sides"]:
        if side["side"].startswith("ours") and "error" in side:
            raise SideFailed(f"{side['workload']}: {side['side']} failed: {side['error']}")
