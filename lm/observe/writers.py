"""Where the numbers of a run go: metrics.jsonl, the console, TensorBoard, Weights & Biases.

A record is one flat JSON object. A training line: step, tokens, seconds, train/loss (nats a token), …; an evaluation
line: step, eval/nats_per_token, eval/perplexity, … (eval/NAME/… where there are several validation sets).
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from lm.config import InputError
from lm.evaluation.measured import TITLES, titled
from lm.manifest import write_atomically


class Writer(Protocol):
    """What the training loop is handed, on the first process only."""

    def start(self, record: Mapping[str, Any]) -> None:
        """Takes the first line of this start, {"start": {versions, devices, mesh, resumed_from}}."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Takes one training or evaluation line."""

    def close(self) -> None:
        """Puts everything where it belongs. Called once, also after an error."""


class JsonlWriter:
    """Appends one JSON object a line and hands each to the system at once: SIGKILL loses none.

    JSON has no NaN and no infinity: both are written as null. On opening, lines torn by a kill and lines of steps after
    `resume_step` (None: of all steps) are dropped, since the run writes them again; "start" lines stay.
    """

    def __init__(self, path: str | Path, resume_step: int | None = None):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            before = path.read_bytes()
            after = b"".join(line + b"\n" for line in before.splitlines() if _stays(line, resume_step))
            if after != before:
                write_atomically(path, after)
        self._file = path.open("a", encoding="utf-8")

    def start(self, record: Mapping[str, Any]) -> None:
        self.write(record)

    def write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(_jsonable(record), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, start lines included. A line that is just being written is left out."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}. Give the metrics.jsonl of a run") from error
    return [record for record in map(_parsed, lines) if record is not None]


class ConsoleWriter:
    """Shows the run to a person: a progress bar on a terminal, now and then a line elsewhere.

    A plain line comes with the first and the last record, every twentieth of the run and at least every minute.
    Evaluations always have a line, above the bar where there is one.

    Args:
        total_steps: the step at which the run ends; None where `seconds` ends it.
        seconds: the budget of a run that ends by time.
        console: where to write; None is standard output.
    """

    def __init__(self, total_steps: int | None, seconds: float | None = None, *, console: Console | None = None):
        self._total_steps, self._seconds = total_steps, seconds
        self._console = console or Console()
        self._bar = _progress_bar(self._console) if self._console.is_interactive else None
        self._task = self._bar.add_task("", total=total_steps or seconds, line="", validation="") if self._bar else None
        self._origin: tuple[int, float] | None = None
        self._printed_twentieths, self._printed_at = -1, -math.inf
        self._tokens: int | None = None
        self._since: list[tuple[int, float]] = []  # tokens and their speed, of the records since the line before

    def start(self, record: Mapping[str, Any]) -> None:
        if self._bar is not None:
            self._bar.start()

    def write(self, record: Mapping[str, Any]) -> None:
        if "train/loss" in record:
            self._write_training(record)
        validation = [_evaluation(record, name) for name in _evaluated(record)] + _task(record)
        for line in validation:
            self.message(f"step {record['step']}  {line}")
        if _evaluated(record) and self._bar is not None and self._task is not None:
            nats = record[f"{_evaluated(record)[0]}nats_per_token"]
            self._bar.update(self._task, validation=f"  val ppl {_perplexity(nats)}")

    def message(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=self._bar is None)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _write_training(self, record: Mapping[str, Any]) -> None:
        parts = [self._position(record), *_numbers(record), self._time_left(record)]
        line = "  ".join(part for part in parts if part)
        if self._bar is not None and self._task is not None:
            short = line.removeprefix("step ").replace("perplexity", "ppl").replace("tokens/s", "tok/s")
            done = record["step"] if self._seconds is None else record["seconds"]
            self._bar.update(self._task, completed=done, line=short)
            return
        record = self._average(record)
        twentieths, now = int(20 * self._share(record)), time.monotonic()
        if twentieths > self._printed_twentieths or now >= self._printed_at + 60:
            self._printed_twentieths, self._printed_at = twentieths, now
            parts[1:-1] = _numbers(record)
            self._since.clear()
            self.message("  ".join(part for part in parts if part))

    def _average(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """The record with the speed since the line before: a single step's jumps about. Time between steps, such as an
        evaluation's, is in no record's speed and so not in this."""
        tokens, speed = record.get("tokens"), record.get("train/tokens_per_second")
        if tokens is None or not speed:
            return record
        if self._tokens is not None and tokens > self._tokens:
            self._since.append((tokens - self._tokens, speed))
        self._tokens = tokens
        if not self._since:
            return record
        average = sum(new for new, _ in self._since) / sum(new / each for new, each in self._since)
        return {**record, "train/tokens_per_second": average}

    def _position(self, record: Mapping[str, Any]) -> str:
        return f"step {record['step']}" + (f"/{self._total_steps}" if self._total_steps else "")

    def _share(self, record: Mapping[str, Any]) -> float:
        """How much of the budget is used, from 0 to 1."""
        if self._total_steps is not None:
            return record["step"] / self._total_steps
        return record["seconds"] / self._seconds if self._seconds else 0.0

    def _time_left(self, record: Mapping[str, Any]) -> str:
        """Counted from this process's first record: neither compilation nor an earlier start distorts it."""
        if self._total_steps is None:
            return f"{_clock(self._seconds - record['seconds'])} left" if self._seconds else ""
        step, seconds = record["step"], record.get("seconds")
        if seconds is None:
            return ""
        if self._origin is None:
            self._origin = step, seconds
        steps_done, seconds_used = step - self._origin[0], seconds - self._origin[1]
        return f"{_clock(seconds_used / steps_done * (self._total_steps - step))} left" if steps_done else ""


class TensorBoardWriter:
    """Writes the numbers as TensorBoard scalars. On resuming, what was logged after `resume_step` is hidden."""

    def __init__(self, directory: str | Path, resume_step: int | None = None):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise InputError("TensorBoard events need the package tensorboardX: pip install tensorboardX") from error
        self._first = first = 0 if resume_step is None else resume_step + 1
        # the suffix keeps two starts within one second apart: tensorboardX names files by the second
        self._events = SummaryWriter(str(directory), purge_step=first, filename_suffix=f".{first}", flush_secs=5)

    def start(self, record: Mapping[str, Any]) -> None:
        self._events.add_text("start", f"```\n{json.dumps(_jsonable(record), indent=2)}\n```", self._first)

    def write(self, record: Mapping[str, Any]) -> None:
        for name, value in _scalars(record).items():
            self._events.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._events.close()


class WandbWriter:
    """Logs to Weights & Biases. The run's id is kept in `directory`: a resumed run goes on as the same one there.

    W&B takes no step before the last it has: it leaves out the lines that a resumed run repeats, which are the same.
    """

    def __init__(self, project: str, directory: str | Path, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise InputError("Weights & Biases needs the package wandb: pip install wandb") from error
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        kept = directory / "wandb_id"
        if not kept.exists():
            write_atomically(kept, secrets.token_hex(8))
        try:
            self._run = wandb.init(
                project=project, dir=str(directory), config=dict(config), id=kept.read_text().strip(), resume="allow"
            )
        except wandb.Error as error:
            raise InputError(
                f"Weights & Biases can't start: {error}. Run `wandb login`, set WANDB_MODE=offline, "
                "or set observe.wandb_project to None"
            ) from error

    def start(self, record: Mapping[str, Any]) -> None:
        self._run.config.update(_jsonable(record), allow_val_change=True)

    def write(self, record: Mapping[str, Any]) -> None:
        self._run.log(_scalars(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


def _stays(line: bytes, resume_step: int | None) -> bool:
    record = _parsed(line)
    if record is None:
        return False
    return "step" not in record or (resume_step is not None and record["step"] <= resume_step)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _jsonable(value: Any) -> Any:
    """Plain JSON values: arrays of one number become numbers, NaN and infinities null."""
    if isinstance(value, Mapping):
        return {str(name): _jsonable(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(entry) for entry in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in record.items() if name != "step" and value is not None}


def _progress_bar(console: Console) -> Progress:
    def text(template: str) -> TextColumn:
        return TextColumn(template, markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))

    bar = BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4, max_width=40))
    columns = bar, text("{task.fields[line]}"), text("{task.fields[validation]}")
    return Progress(*columns, console=console, expand=True, refresh_per_second=4)


def _numbers(record: Mapping[str, Any]) -> list[str]:
    loss, speed = record["train/loss"], record.get("train/tokens_per_second")
    shown = [f"loss {_loss(loss)}", f"perplexity {_perplexity(loss)}"]
    return shown if speed is None else [*shown, f"{_short(speed)} tokens/s"]


def _evaluated(record: Mapping[str, Any]) -> list[str]:
    """The prefixes of the evaluations in a record: eval/, or where there are names eval/NAME/ of each."""
    ending = "nats_per_token"
    found = [name.removesuffix(ending) for name in record if name.startswith("eval/") and name.endswith(ending)]
    return [prefix for prefix in found if prefix != "eval/"] or found


def _evaluation(record: Mapping[str, Any], prefix: str) -> str:
    name = prefix.removeprefix("eval/").rstrip("/")
    nats, bits = record[f"{prefix}nats_per_token"], record.get(f"{prefix}bits_per_byte")
    line = f"validation{f' {name}' if name else ''} loss {_loss(nats)}  perplexity {_perplexity(nats)}"
    return line if bits is None else f"{line}  bits per byte {bits:.4f}"


def _task(record: Mapping[str, Any]) -> list[str]:
    """The metrics of what the model wrote, where a record has them."""
    found = {name: record[f"eval/{name}"] for name in TITLES if f"eval/{name}" in record}
    return [f"validation {titled(found)}"] if found else []


def _loss(nats: float | None) -> str:
    return "nan" if nats is None else f"{nats:.4f}"


def _perplexity(nats: float | None) -> str:
    if nats is None:
        return "nan"
    return f"{math.exp(nats):.4g}" if nats < 700 else "inf"  # exp(710) overflows


def _short(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
