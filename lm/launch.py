"""Runs a command as several processes on this machine, each with CPU devices of its own: for tests and for teaching."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from lm.config import InputError

GRACE_SECONDS = 60.0
"""For the other processes to end in good order once one has failed. Their watch over each other takes half of it."""
_POLL_SECONDS = 0.02


def launch(command: Sequence[str], *, processes: int, devices: int = 1, seconds: float | None = None) -> int:
    """Runs `python COMMAND` as `processes` processes of one run and returns the first exit status that isn't 0.

    The first process's output is passed on as it is, of the others what they write to stderr, with their number in
    front. Ctrl-C and SIGTERM go to all of them. Once one has failed the others have GRACE_SECONDS to end; then they are
    killed.

    Args:
        command: train.py or eval.py (that of this checkout, where there is none in the current folder) and its
            arguments, or another script or `-m MODULE` that connects as these do.
        devices: CPU devices of each process.
        seconds: after which all are killed; None: never.
    """
    if processes < 1 or devices < 1:
        raise InputError(f"--processes {processes} --devices {devices}: use 1 or more of each")
    arguments = [sys.executable, *_program(command)]
    environment = os.environ | {
        "LM_COORDINATOR": f"127.0.0.1:{_free_port()}",
        "LM_PROCESSES": str(processes),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
    }
    running: list[subprocess.Popen[str]] = []
    threads: list[threading.Thread] = []

    def forward(number: int, frame: FrameType | None) -> None:
        for process in running:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for index in range(processes):
            running.append(_start(arguments, environment, index))
            if (errors := running[-1].stderr) is not None:
                prefix = f"process {index}: "
                threads.append(threading.Thread(target=_pass_on, args=(errors, prefix), daemon=True))
                threads[-1].start()
        return _wait(running, seconds)
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
            process.wait()
        for thread in threads:
            thread.join(5)  # what was written last is to be seen too
        for number, handler in before.items():
            signal.signal(number, handler)


def _program(command: Sequence[str]) -> list[str]:
    """The command with its script found."""
    if not command:
        raise InputError("no command to launch: python -m lm launch --processes N -- train.py ...")
    script, rest = command[0], command[1:]
    if script == "-m" or Path(script).is_file():
        return list(command)
    beside = Path(__file__).parent.parent / script
    if not script.endswith(".py") or not beside.is_file():
        raise InputError(f"there is no script {script}: launch train.py or eval.py, the path of another, or -m MODULE")
    return [str(beside), *rest]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(arguments: list[str], environment: dict[str, str], index: int) -> subprocess.Popen[str]:
    """One process, in a session of its own: Ctrl-C reaches it through us, and once."""
    own = environment | {"LM_PROCESS": str(index)}
    if index == 0:
        return subprocess.Popen(arguments, env=own, stdin=subprocess.DEVNULL, text=True, start_new_session=True)
    return subprocess.Popen(
        arguments, env=own, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip


def _pass_on(stream: IO[str], prefix: str) -> None:
    for line in stream:
        print(f"{prefix}{line}", end="", file=sys.stderr, flush=True)


def _wait(running: list[subprocess.Popen[str]], seconds: float | None) -> int:
    """Waits for the processes; the first status that isn't 0, of one ended by a signal 128 more than its number."""
    status, until = 0, None if seconds is None else time.monotonic() + seconds
    ended: set[int] = set()
    while len(ended) < len(running):
        for index, process in enumerate(running):
            if index in ended or process.poll() is None:
                continue
            ended.add(index)
            code = process.returncode
            if code < 0:
                print(f"process {index} was ended by {signal.Signals(-code).name}", file=sys.stderr, flush=True)
            if code and not status:
                status = code if code > 0 else 128 - code
                grace = time.monotonic() + GRACE_SECONDS
                until = grace if until is None else min(until, grace)
        if until is not None and time.monotonic() > until:
            left = [str(index) for index in range(len(running)) if index not in ended]
            why = "others have failed" if status else f"{seconds:g} seconds are over"
            print(f"killed     process {', '.join(left)}: {why}", file=sys.stderr, flush=True)
            return status or 124
        time.sleep(_POLL_SECONDS)
    return status
