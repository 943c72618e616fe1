"""The watch that processes of a run keep over each other: when one fails or is gone, all end, with one message.

A thread of each process lets its heart beat into the key-value store, where the first process looks after all. How the
run ends is written there once, by whoever knows first, and every process reads it: within a second where a process says
that it fails, within LOST_SECONDS and a few more where one is gone without a word. JAX's own heartbeat would abort the
processes instead, with a stack trace, and of the one that is gone only the number.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from lm.processes import coordination

BEAT_SECONDS = 1.0
LOST_SECONDS = 20.0
"""A process of which nothing is heard for so long is gone. All others have ended LOST_SECONDS + 10 after its end."""
LOST_STATUS = 75
"""Exit status of a process whose others are gone: sysexits' EX_TEMPFAIL, "try again"."""
_FROM_DEVICES = re.compile(r"(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|FAILED_PRECONDITION|DEADLINE_EXCEEDED): ")


class HostError(RuntimeError):
    """Another process is gone, or doesn't come: nothing that this one or its arguments can mend."""


def reachable(address: str, seconds: float = 2.0) -> bool:
    """Whether something listens at HOST:PORT, and answers within `seconds`."""
    return _failure(address, seconds) is None


def closed(address: str, seconds: float = 2.0) -> bool:
    """Whether the host says that nothing listens at HOST:PORT: unlike no answer, that isn't a busy machine."""
    return isinstance(_failure(address, seconds), ConnectionRefusedError)


def _failure(address: str, seconds: float) -> OSError | None:
    """What hinders a connection to HOST:PORT; None where nothing does."""
    try:
        with _connected(address, seconds):
            return None
    except OSError as error:
        return error


def _connected(address: str, seconds: float) -> socket.socket:
    """A connection to HOST:PORT; OSError where there is none within `seconds`."""
    host, _, port = address.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), seconds)


def end_now(message: str | None, status: int) -> None:
    """Ends the process: without JAX's own way of ending, which waits for all the others."""
    with contextlib.suppress(OSError, ValueError):
        if message is not None:
            print(message, file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            if stream.isatty():
                stream.write("\x1b[?25h")  # a progress bar hides the cursor
            stream.flush()
    os._exit(status)


class _Watch:
    """The threads of a process: one writes that it lives, one reads whether all end, one holds on to the first."""

    def __init__(self) -> None:
        self.number, self.own, self.first = coordination.number(), coordination.own(), coordination.own() == 0
        self.continues: Callable[[], str] | None = None
        self.stopped = threading.Event()
        self.ending = threading.Lock()  # taken once, by the thread that ends the process
        self.heard = time.monotonic()  # when the service last answered
        self.seen = dict.fromkeys(range(1, self.number), ("", self.heard))
        works = (self._beat, self._read) if self.first else (self._beat, self._read, self._hold)
        self.threads = [threading.Thread(target=self._alive(work), daemon=True) for work in works]
        for thread in self.threads:
            thread.start()

    def _alive(self, work: Callable[[int], None]) -> Callable[[], None]:
        def run() -> None:
            beat = 0
            while not self.stopped.is_set():
                with contextlib.suppress(RuntimeError):  # the service is gone: `heard` gets old
                    work(beat := beat + 1)
                self.stopped.wait(BEAT_SECONDS if work == self._beat else 0.05)

        return run

    def _beat(self, beat: int) -> None:
        coordination.put(f"lm/alive/{self.own}", str(beat), again=True)
        self.heard = time.monotonic()
        if not self.first:
            return
        now = coordination.below("lm/alive")
        for process, (last, _) in self.seen.items():
            if (value := now.get(str(process), "")) != last:
                self.seen[process] = value, time.monotonic()
        if lost := self._lost():
            self._tell(LOST_STATUS, _gone(lost))

    def _read(self, _: int) -> None:
        found = None
        with contextlib.suppress(RuntimeError):
            found = coordination.take("lm/end", BEAT_SECONDS)
        if self.stopped.is_set():
            return
        if found is not None:
            self._follow(json.loads(found))
        if self.first:
            return
        silent = time.monotonic() - self.heard
        if silent > LOST_SECONDS or (silent > 3 * BEAT_SECONDS and not reachable(coordination.address())):
            self._end_without_first()

    def _hold(self, _: int) -> None:
        """Keeps a connection to the service that nothing is said over: where the first process ends, so does it.

        JAX finds that out as well, and aborts. The thread of JAX that does so is the one that would bring the answers
        of the service, so that no thread which asks it anything may get one; `_delay_aborting` gives this one 6 s.
        """
        address = coordination.address()
        with contextlib.suppress(OSError), _connected(address, 2.0) as connection:
            connection.settimeout(BEAT_SECONDS)
            while not self.stopped.is_set():
                with contextlib.suppress(TimeoutError):
                    if not connection.recv(4096):  # what comes is the service's greeting
                        break
        if not self.stopped.is_set() and closed(address):
            self._end_without_first()

    def _end_without_first(self) -> None:
        self.ending.acquire(timeout=2.0)  # whoever has it may wait for an answer of the service, which won't come
        end_now(self._line(f"{_gone([0])}, which the others depend on"), LOST_STATUS)

    def _lost(self) -> list[int]:
        now = time.monotonic()
        return [process for process, (_, since) in self.seen.items() if now - since > LOST_SECONDS]

    def _tell(self, status: int, message: str) -> None:
        coordination.put("lm/end", json.dumps({"by": self.own, "status": status, "message": message}))

    def _follow(self, end: dict[str, Any]) -> None:
        """Ends as all do. What another process says the first one says, unless it comes to say the same itself."""
        if self.first and end["by"] != self.own:
            time.sleep(BEAT_SECONDS)
        with self.ending:
            if not self.first:
                self._leave(end["status"], None)
            lost = end["status"] == LOST_STATUS
            whose = "" if end["by"] == self.own else f"process {end['by']}: "
            self._leave(end["status"], self._line(end["message"]) if lost else f"error: {whose}{end['message']}")

    def fail(self, status: int, message: str) -> None:
        with self.ending:
            with contextlib.suppress(RuntimeError):
                self._tell(status, message)
                if not self.first and coordination.take("lm/said", 5.0) is not None:
                    self._leave(status, None)
            whose = "" if self.first else f"process {self.own}: "
            self._leave(status, self._line(whose + message) if status == LOST_STATUS else f"error: {whose}{message}")

    def _leave(self, status: int, message: str | None) -> None:
        """Ends this process; the first, with which the service ends, waits a little for the others to have gone."""
        with contextlib.suppress(RuntimeError):
            coordination.put(f"lm/left/{self.own}", "")
            if self.first:
                coordination.put("lm/said", "")
                if message is not None:
                    print(message, file=sys.stderr, flush=True)
                    message = None
                others, until = self.number - 1 - len(self._lost()), time.monotonic() + 4 * BEAT_SECONDS
                while len(coordination.below("lm/left")) <= others and time.monotonic() < until:
                    time.sleep(0.05)
        end_now(message, status)

    def _line(self, message: str) -> str:
        return f"error: {message}." + ("" if self.continues is None else f" {self.continues()}")


_watch: _Watch | None = None


def start() -> None:
    """Begins the watch."""
    global _watch
    _watch = _Watch()
    _delay_aborting()


def stop() -> None:
    """Ends it: the others may go."""
    if _watch is not None:
        _watch.stopped.set()
        for thread in _watch.threads:
            thread.join(5)
        signal.signal(signal.SIGABRT, signal.SIG_DFL)


def watching() -> bool:
    """Whether there are others that would have to end with this process."""
    return _watch is not None and not _watch.stopped.is_set()


def continues(say: Callable[[], str]) -> None:
    """What is said of how to continue, where processes are gone."""
    if _watch is not None:
        _watch.continues = say


def fail(status: int, message: str) -> None:
    """Ends this process and all others, with this status and one message; returns where there are no others."""
    if _watch is not None and watching():
        _watch.fail(status, message)


def wait_for_word(error: BaseException) -> None:
    """Where an error may come of another process's end, waits until the watch has found that out, and ends with it."""
    if watching() and any(_FROM_DEVICES.search(str(each)) for each in _with_causes(error)):
        time.sleep(LOST_SECONDS + 5)


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, what that was, and so on: Orbax tells of a lost process as of a timeout."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _gone(processes: list[int]) -> str:
    names = ", ".join(map(str, processes[:8])) + (f" and {len(processes) - 8} more" if len(processes) > 8 else "")
    return f"process {names} is gone" if len(processes) == 1 else f"processes {names} are gone"


def _delay_aborting() -> None:
    """Lets this process live on for a while where JAX aborts it because the first process is gone, so that the watch
    finds that out and says it.

    The handler of SIGABRT is the C library's sleep: called with the signal's number it sleeps for 6 seconds, and then
    the abort goes on. No Python runs inside of it.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.signal.argtypes, library.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))
