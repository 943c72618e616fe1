"""The processes of a run: how they wait for each other and agree. All of it on the hosts.

Every process makes the same calls in the same order. With a single process each call returns at once and starts
nothing.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from lm.config import InputError
from lm.processes import coordination, watch
from lm.processes.rendezvous import connect as connect
from lm.processes.watch import HostError as HostError

TIMEOUT = 600.0
"""Seconds that processes wait for each other where all have about the same to do."""
LONG = 7 * 24 * 3600.0
"""Seconds that they wait where one of them works alone. That it is gone is found out much sooner: watch.py."""
_KEPT = 64
"""Values of one name that are still there when later ones are: a process is never so far behind in a loop."""

_calls: collections.Counter[str] = collections.Counter()


def count() -> int:
    """How many processes there are; looks for no devices, as `jax.process_count` does."""
    return coordination.number()


def index() -> int:
    """Which of them this one is, from 0."""
    return coordination.own()


def is_first() -> bool:
    """Whether this is the one that writes the log and the files."""
    return index() == 0


def barrier(name: str, seconds: float = TIMEOUT) -> None:
    """Returns when all processes have come. Raises HostError, naming those that haven't within `seconds`."""
    if count() == 1:
        return
    key = _unique(name)
    coordination.put(f"lm/at/{key}/{index()}", "")
    if coordination.meet(key, seconds):
        if is_first():
            coordination.drop(f"lm/at/{key}")
        return
    missing = sorted(set(range(count())) - {int(process) for process in coordination.below(f"lm/at/{key}")})
    raise HostError(f"{_listed(missing) or 'a process'} didn't come to {name!r} within {seconds:g} s")


def agree(name: str, value: str) -> str:
    """The first process's value, for all of them; only they wait for it, and no device does."""
    if count() == 1:
        return value
    key = _unique(name)
    if is_first():
        coordination.put(f"lm/agreed/{key}", value)
        if (number := _calls[name] - _KEPT) > 0:
            coordination.drop(f"lm/agreed/{name}/{number}")
        return value
    told = coordination.take(f"lm/agreed/{key}", LONG)
    if told is None:
        raise HostError(f"process 0 didn't say {name!r}")
    return told


def same(what: str, value: str) -> None:
    """Raises InputError, on every process alike, naming those whose value differs from the first's.

    Of values that are JSON objects it names the fields, with both values.
    """
    if count() == 1:
        return
    key = f"lm/same/{_unique(what)}"
    coordination.put(f"{key}/sha256/{index()}", hashlib.sha256(value.encode()).hexdigest())
    if is_first():
        coordination.put(f"{key}/value/0", value)
    barrier(f"the comparison of the {what}")
    digests = {int(process): digest for process, digest in coordination.below(f"{key}/sha256").items()}
    others = sorted(process for process, digest in digests.items() if digest != digests[0])
    if not others:
        return
    if index() == others[0]:
        coordination.put(f"{key}/value/{index()}", value)
    first, other = (coordination.take(f"{key}/value/{process}", TIMEOUT) or "" for process in (0, others[0]))
    lines = "".join(f"\n  {line}" for line in _differences(first, other, others[0]))
    verb = "has" if len(others) == 1 else "have"
    raise InputError(
        f"{_listed(others)} {verb} another {what} than process 0:{lines}\nStart the same command everywhere, with the "
        "same version of lm and jax and the same data"
    )


@contextlib.contextmanager
def in_turn(what: str) -> Iterator[None]:
    """Inside goes the first process, and when it has come out the others: they find what it has made and kept.

    However long that takes; a process that is gone meanwhile is found out by the watch.
    """
    if not is_first():
        barrier(what, LONG)
    yield
    if is_first():
        barrier(what, LONG)


def tell(name: str, value: str) -> None:
    """Leaves word for the others under a name, once: what is told later under it is dropped."""
    if count() > 1:
        coordination.put(f"lm/told/{name}", value)


def told(name: str) -> str | None:
    """The word that some process has left, if any has."""
    return None if count() == 1 else coordination.peek(f"lm/told/{name}")


def finish() -> None:
    """Ends the watch over the others, when all have come to the end of their work. Then the process may end."""
    if count() > 1:
        barrier("the end", LONG)
        watch.stop()


def _unique(name: str) -> str:
    """A name for this call: the same in every process, and never used before."""
    _calls[name] += 1
    return f"{name}/{_calls[name]}"


def _listed(processes: list[int]) -> str:
    shown = ", ".join(map(str, processes[:8])) + (f" and {len(processes) - 8} more" if len(processes) > 8 else "")
    return "" if not processes else f"process {shown}" if len(processes) == 1 else f"processes {shown}"


def _differences(first: str, other: str, process: int) -> list[str]:
    """What two values differ in, a line each, at most eight."""
    ours, theirs = (_flat(text) for text in (first, other))
    if not ours or not theirs:
        return [f"{first[:200]!r} on process 0, {other[:200]!r} on process {process}"]
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    lines = [f"{n}: {ours.get(n)!r} on process 0, {theirs.get(n)!r} on process {process}" for n in names[:8]]
    return lines + ([f"and {len(names) - 8} more"] if len(names) > 8 else [])


def _flat(text: str) -> dict[str, Any]:
    """The leaves of a JSON object by dotted names; of anything else none."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    leaves: dict[str, Any] = {}

    def gather(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, each in value.items():
                gather(f"{name}.{key}" if name else key, each)
        else:
            leaves[name] = value

    if isinstance(value, dict):
        gather("", value)
    return leaves
