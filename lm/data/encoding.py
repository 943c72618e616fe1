"""Encoding texts in processes of their own: a tokenizer's work runs beside everything else, on every core.

The processes are started as commands rather than by `multiprocessing`, which would run the user's main module again
in each (and in a script without `if __name__ == "__main__"` without end).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np

from lm.config import InputError
from lm.data.tokenizer import Tokenizer


class Encoded(NamedTuple):
    """One text's ids, in the smallest unsigned type that holds the vocabulary, and its size in bytes and words."""

    ids: np.ndarray
    bytes: int
    words: int


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[Encoded]:
    """Encodes texts and measures them: UTF-8 bytes, and words separated by whitespace."""
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    sizes = [(len(text.encode()), len(text.split())) for text in texts]
    try:
        batches = zip(tokenizer.encode_batch(texts), sizes, strict=True)
    except Exception as error:
        if type(error) is not Exception:  # what the tokenizers library raises for whatever it can't do
            raise
        raise InputError(f"the tokenizer can't encode the text: {error}") from error
    return [Encoded(ids.astype(dtype), *size) for ids, size in batches]


class Encoders:
    """Encodes batches of texts, in order, in `processes` processes; with 1, in this one, over all its threads."""

    def __init__(self, tokenizer: Tokenizer, processes: int):
        self.tokenizer, self.processes = tokenizer, processes
        self._own = threading.local()
        self._running: list[subprocess.Popen] = []
        # Two threads in this process: while the library encodes one batch, Python takes the last one's ids.
        self._threads = ThreadPoolExecutor(max_workers=max(processes, 2))

    def map(self, batches: Iterable[list[str]]) -> Iterator[list[Encoded]]:
        """The encoded batches. Takes a few batches ahead of those given back, never all."""
        waiting: deque[Future[list[Encoded]]] = deque()
        for batch in batches:
            waiting.append(self._threads.submit(self._encode, batch))
            if len(waiting) > self.processes + 2:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def __enter__(self) -> Encoders:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._threads.shutdown(cancel_futures=True)
        for process in self._running:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()  # the end of its input is the end of its work
            process.wait()
            process.stdout.close()

    def _encode(self, texts: list[str]) -> list[Encoded]:
        if self.processes == 1:
            return encode(self.tokenizer, texts)
        process = getattr(self._own, "process", None) or self._start()
        try:
            if not hasattr(self._own, "process"):
                _send(process.stdin, self.tokenizer)
                self._own.process = process
            _send(process.stdin, texts)
            answer = _receive(process.stdout)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError) as error:
            raise InputError(
                f"a process that tokenises has died (exit status {process.wait()}): if it ran out of memory, use fewer "
                "of them with data.tokenizer_processes"
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _start(self) -> subprocess.Popen:
        """A process for this thread."""
        program = f"import sys; sys.path[:] = {sys.path!r}; from lm.data import encoding; encoding.serve()"
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}  # a process, a core
        command = [sys.executable, "-c", program]
        try:
            process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as error:
            raise InputError(
                f"no process can be started to tokenise: {error.strerror}; use fewer with data.tokenizer_processes"
            ) from error
        self._running.append(process)
        return process


def serve() -> None:
    """What each process does: reads a tokenizer and then batches of texts, until its input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between our answers
    tokenizer = _receive(source)
    while True:
        try:
            texts = _receive(source)
        except EOFError:
            return
        try:
            _send(sink, encode(tokenizer, texts))
        except BrokenPipeError:  # nobody is waiting any more
            os._exit(1)
        except Exception as error:  # raised again on the other side
            _send(sink, error)


def _send(pipe: IO[bytes] | None, what: object) -> None:
    assert pipe is not None
    pickle.dump(what, pipe, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.flush()


def _receive(pipe: IO[bytes] | None) -> Any:
    assert pipe is not None
    return pickle.load(pipe)
