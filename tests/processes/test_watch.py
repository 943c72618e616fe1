"""The watch over the first process, in processes that JAX gives no answer."""

from __future__ import annotations

import signal

from lm.processes import watch
from tests.end_to_end import commands


def test_the_end_of_the_first_process_is_known_without_an_answer_of_the_service():
    alone = ["-m", "tests.processes.unanswered"]
    first, second = processes = commands.start_each(alone, alone)
    try:
        assert [process.stdout.readline() for process in processes] == ["connected\n"] * 2
        first.send_signal(signal.SIGKILL)
        left = commands.finish(second)
    finally:
        for process in processes:
            process.kill()
    assert left.status == watch.LOST_STATUS, left
    # JAX's own service may say what it saw on a line after it.
    assert "error: process 0 is gone, which the others depend on." in left.stderr.splitlines(), left
