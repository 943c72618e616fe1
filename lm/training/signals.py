"""Stopping in good order: SIGTERM and Ctrl-C become a request that the loop sees between two steps."""

from __future__ import annotations

import json
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from lm.processes import hosts


class StopRequest:
    """While entered, the first SIGTERM or SIGINT is noted; a second Ctrl-C interrupts at once.

    `noted` is what this process got; `signal` is what the run stops for, in all processes between the same two steps.
    """

    def __init__(self) -> None:
        self.noted: int | None = None
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.noted is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.noted = number


def decided(seconds: float, stop: StopRequest) -> float:
    """What all processes go by: the seconds of the first one's clock and, in `stop.signal`, what any of them got.

    The first says it before each step. The others wait for that, and for no device; a single process goes on at once.
    """
    if hosts.count() == 1:
        stop.signal = stop.noted
        return seconds
    if stop.noted is not None:
        hosts.tell("stop", str(stop.noted))
    word = hosts.told("stop") if hosts.is_first() else None
    first = hosts.agree("a step", json.dumps([seconds, None if word is None else int(word)]))
    seconds, stop.signal = json.loads(first)
    return seconds
