import os
import signal

import numpy as np
import pytest

from lm.config import InputError
from lm.data import encoding
from lm.data.encoding import Encoders
from lm.data.tokenizer import ByteTokenizer

BATCHES = [[f"text {n}", "é" * n, "two words"] for n in range(12)]


def test_processes_change_nothing():
    with Encoders(ByteTokenizer(), 1) as alone, Encoders(ByteTokenizer(), 2) as together:
        expected, found = list(alone.map(BATCHES)), list(together.map(BATCHES))
    assert len(together._running) == 2
    for one, two, texts in zip(expected, found, BATCHES, strict=True):
        for each, other, text in zip(one, two, texts, strict=True):
            assert each.ids.tolist() == other.ids.tolist() == list(text.encode())
            assert each.ids.dtype == other.ids.dtype == np.uint16
            assert each[1:] == other[1:] == (len(text.encode()), len(text.split()))


def test_batches_are_taken_as_they_are_needed():
    taken = []

    def batches():
        for number in range(100):
            taken.append(number)
            yield ["text"]

    with Encoders(ByteTokenizer(), 1) as encoders:
        next(encoders.map(batches()))
        assert len(taken) < 10


def test_a_process_that_dies_is_said():
    with Encoders(ByteTokenizer(), 2) as encoders:
        made = encoders.map(BATCHES)
        next(made)
        for process in encoders._running:
            os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(InputError, match=r"has died \(exit status -9\): .*data.tokenizer_processes"):
            list(made)


class Broken(ByteTokenizer):
    def encode_batch(self, texts):
        print("a library may print")
        return [1 / 0 for _ in texts]


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_in_a_batch_is_raised_here(processes):
    with Encoders(Broken(), processes) as encoders, pytest.raises(ZeroDivisionError):
        list(encoders.map(BATCHES))


def test_a_process_that_can_not_start_is_said(monkeypatch):
    monkeypatch.setattr(encoding.sys, "executable", "/bin/false")
    with Encoders(ByteTokenizer(), 2) as encoders, pytest.raises(InputError, match=r"has died \(exit status 1\)"):
        list(encoders.map(BATCHES))
    monkeypatch.setattr(encoding.sys, "executable", "/nowhere")
    with Encoders(ByteTokenizer(), 2) as encoders, pytest.raises(InputError, match="no process can be started"):
        list(encoders.map(BATCHES))
