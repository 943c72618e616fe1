"""Runs the commands as a user does, in processes of their own from the repository root, and reads what they leave."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 240

# Two layers with dropout, accumulation and learned positions: everything whose state could be lost on the way.
TINY: Mapping[str, Any] = {
    "model.num_layers": 2,
    "model.d_model": 32,
    "model.num_heads": 2,
    "model.positions": "learned",
    "model.dropout": 0.1,
    "tokenizer.kind": "bytes",
    "data.context": 32,
    "training.batch_size": 8,
    "training.gradient_accumulation": 2,
    "optimizer.learning_rate": 3e-3,
    "optimizer.warmup_steps": 10,
    "evaluation.every_steps": None,
    "evaluation.max_tokens": None,
    "observe.sample_prompt": None,
}


@dataclasses.dataclass(frozen=True)
class Result:
    """How a process ended and what it said; `message` is stderr without boxes, line breaks and JAX's own log."""

    status: int
    stdout: str
    stderr: str

    @property
    def message(self) -> str:
        lines = [line for line in self.stderr.splitlines() if not line.startswith("WARNING:jax")]
        return " ".join(re.sub("[─│╭╮╰╯]", " ", "\n".join(lines)).split())


def train(source: str, workdir: Path, **changes: Any) -> list[str]:
    """The arguments of a tiny run. Fields are written `section__field`; None is passed on as None."""
    fields = {"data.train": source, **TINY, **{name.replace("__", "."): value for name, value in changes.items()}}
    flags = (part for name, value in fields.items() for part in (f"--{name}", str(value)))
    return ["train.py", "tiny", "--workdir", str(workdir), *flags]


def start(arguments: Sequence[str], *, devices: int = 1, **environment: str) -> subprocess.Popen[str]:
    """Starts `python ARGUMENTS` with so many fake CPU devices.

    What one process has compiled the next finds in a cache, which halves the time of the tests; JAX's own variables in
    `environment` can turn that off.
    """
    strict = ("JAX_NUMPY_RANK_PROMOTION", "XLA_FLAGS")  # set for the tests in this process alone
    inherited = {name: value for name, value in os.environ.items() if name not in strict}
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "COLUMNS": "200",
        **environment,
    }
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=inherited | settings, text=True, encoding="utf-8", stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> Result:
    try:
        stdout, stderr = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return Result(process.returncode, stdout, stderr)


def run(arguments: Sequence[str], *, devices: int = 1, **environment: str) -> Result:
    """Runs `python ARGUMENTS` to its end, whatever that is."""
    return finish(start(arguments, devices=devices, **environment))


def succeed(arguments: Sequence[str], *, devices: int = 1, **environment: str) -> Result:
    """Runs `python ARGUMENTS`, which must end with status 0."""
    result = run(arguments, devices=devices, **environment)
    assert result.status == 0, f"{arguments} ended with {result.status}\n{result.stdout}\n{result.stderr}"
    return result


def launched(arguments: Sequence[str], processes: int) -> list[str]:
    """The arguments that run a command as several processes."""
    return ["-m", "lm", "launch", "--processes", str(processes), "--timeout", str(TIMEOUT_SECONDS), "--", *arguments]


def start_each(
    *arguments: Sequence[str], environments: Sequence[Mapping[str, str]] = ()
) -> list[subprocess.Popen[str]]:
    """Starts the processes of one run, each by its own arguments and with its own environment besides."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    place = {"LM_COORDINATOR": address, "LM_PROCESSES": str(len(arguments))}
    own = environments or [{}] * len(arguments)
    return [
        start(each, **place, LM_PROCESS=str(index), **environment)
        for index, (each, environment) in enumerate(zip(arguments, own, strict=True))
    ]


def stop_after(
    arguments: Sequence[str], number: signal.Signals, reached: Callable[[], bool], **environment: str
) -> Result:
    """Starts a process and sends it a signal as soon as `reached()`."""
    process = start(arguments, **environment)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        while not reached():
            assert process.poll() is None, f"the run was to be stopped, but it ended by itself: {finish(process)}"
            assert time.monotonic() < deadline, "the run never got to where it was to be stopped"
            time.sleep(0.002)
        process.send_signal(number)
        return finish(process)
    finally:
        process.kill()


def at_once(*jobs: Callable[[], Any]) -> list[Any]:
    """The results of the jobs, two at a time: a process is busy on one core for most of a short run."""
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


def records(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, a line that is being written left out."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def losses(workdir: Path) -> list[tuple[int, float]]:
    """(step, train/loss) of all training lines, in their order in the file."""
    return [(record["step"], record["train/loss"]) for record in records(workdir) if "train/loss" in record]


def evaluations(workdir: Path) -> list[dict[str, Any]]:
    return [record for record in records(workdir) if "eval/nats_per_token" in record]


def steps(workdir: Path) -> list[int]:
    """The steps of the complete checkpoints."""
    folders = (manifest.parent.name for manifest in workdir.glob("checkpoints/*/manifest.json"))
    return sorted(int(name) for name in folders if name.isdigit())


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder with the hash of its bytes; empty where the folder doesn't exist."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_text(path: Path, *, sentences: int = 2000, seed: int = 0) -> Path:
    """Pseudo-English of about 33 bytes a sentence, the same on every machine."""
    choose = random.Random(seed).choice
    path.write_text("".join(_sentence(choose) for _ in range(sentences)), encoding="utf-8")
    return path


def sentence(seed: int) -> str:
    """One sentence."""
    return _sentence(random.Random(seed).choice)


def _sentence(choose: Callable[[Sequence[str]], str]) -> str:
    parts: Iterable[str] = (choose(words) for words in (_SUBJECTS, _VERBS, _OBJECTS))
    return " ".join(parts) + choose([".", ".", ",", ";"]) + choose([" ", "\n"])


_SUBJECTS = ["the cat", "a dog", "my sister", "the old sailor", "every teacher", "the river", "the moon", "nobody"]
_VERBS = ["sees", "follows", "remembers", "paints", "hears", "forgets", "carries", "draws", "counts"]
_OBJECTS = ["the house", "a red apple", "the long road", "the winter sea", "an open book", "old songs", "a green lamp"]
