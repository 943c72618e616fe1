"""What the measurements of evaluation and generation have in common: a model folder that both sides open, and turns."""

from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.machine import Allocator, Dtype
from benchmarks.turns import Entry, Turns, beside, check_ours
from benchmarks.workloads import workload
from lm import output
from lm.config import InputError

STORIES = "stories"


@dataclasses.dataclass(frozen=True)
class Reading:
    """Arguments of both commands."""

    workloads: tuple[str, ...] = ("W1", "W2", "W3")
    """Of W1, W2 and W3: GPT-2 models of these shapes, drawn at random, on random ids; and stories: the model of
    --stories, on its text."""
    stories: str | None = None
    """A Hugging Face model folder with a tokenizer and a stories.txt."""
    transformers: bool = True
    """Beside transformers, where it and torch are installed."""
    dtypes: tuple[Dtype, ...] = ("float32",)
    """Of both sides' weights and products."""
    allocator: Allocator = "default"
    """For both sides: default, as a user gets it who asks for nothing; huge_pages of glibc; jemalloc."""
    jemalloc: str | None = None
    """The library for the jemalloc setting. None: an installed one."""
    rounds: int = 5
    """Turns of each side."""
    turn_seconds: float = 1.0
    """How long a turn takes, at least one whole pass."""
    json: str | None = None
    """Also write the figures to this file."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A model folder, ids for it, and what both sides are told to do with them."""

    name: str
    folder: Path
    ids: np.ndarray
    spec: dict[str, Any]
    tokens: int  # done in one pass


def check(arguments: Reading) -> None:
    """Raises InputError on arguments that don't fit, before anything runs."""
    machine.check_counts(arguments)
    for name in arguments.workloads:
        if name != STORIES:
            workload(name, also=(STORIES,))
        elif arguments.stories is None or not (Path(arguments.stories) / "stories.txt").is_file():
            raise InputError(f"--workloads {STORIES} needs --stories DIR, a model folder with a stories.txt")


def model_folder(arguments: Reading, name: str, place: Path) -> Path:
    """The folder of a workload's model; one that is drawn at random is written under `place`."""
    if name == STORIES:
        assert arguments.stories is not None, "checked"
        return Path(arguments.stories).absolute()
    import jax

    from lm.checkpoint import Loaded
    from lm.interop import huggingface
    from lm.nn.language_model import model_specs
    from lm.nn.params import initialize

    config = workload(name).config()
    model = dataclasses.replace(config.model, bias=True, activation="gelu_tanh")  # as GPT-2 has them
    params = initialize(model_specs(model), jax.random.key(0))
    folder = place / name
    huggingface.save(
        Loaded(dataclasses.replace(config, model=model), params, None, None, folder), folder, family="gpt2"
    )
    return folder


def story_ids(folder: Path) -> np.ndarray:
    """The text of a folder as ids, after its BOS."""
    from lm.interop import huggingface

    tokenizer = huggingface.load(folder).tokenizer
    if tokenizer is None or tokenizer.first_id is None:
        raise InputError(f"--stories {folder}: its model needs a tokenizer with BOS or EOS")
    text = (folder / "stories.txt").read_text(encoding="utf-8")
    return np.concatenate([[tokenizer.first_id], tokenizer.encode(text)]).astype(np.int32)


def measure(arguments: Reading, cases: Iterator[Case], task: str, console: Console) -> dict[str, Any]:
    """Both sides on each case, in turns."""
    found: dict[str, Any] = {"machine": machine.describe(), "arguments": dataclasses.asdict(arguments)}
    found |= {"sides": [], "duels": []}
    environment = machine.allocator_environment(arguments.allocator, arguments.jemalloc)
    peers = arguments.transformers and all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    for case in cases:
        with tempfile.TemporaryDirectory() as place:
            np.save(Path(place) / "ids.npy", case.ids)
            common = {"task": task, "folder": str(case.folder), "ids": f"{place}/ids.npy", **case.spec}
            for dtype in arguments.dtypes:
                spec = {**common, "dtype": dtype}
                ours = [Entry(f"ours {dtype}", "benchmarks.sides.ours", spec, environment)]
                side = Entry(f"transformers {dtype}", "benchmarks.sides.transformers_reading", spec, environment)
                theirs = [side] if peers else []
                turns = Turns(arguments.rounds, arguments.turn_seconds)
                rows = [{"workload": case.name, **row} for row in beside(ours, theirs, console, case.name, turns)]
                results = {row["side"]: row["result"] for row in rows if "result" in row}
                for row in rows:
                    if "ratio" in row:
                        row["difference"] = difference(results[row["ours"]], results[row["theirs"]])
                        found["duels"].append(row)
                        continue
                    if "seconds_a_step" in row:
                        row["tokens_per_second"] = case.tokens / row["seconds_a_step"]
                    if "weight_bytes" in row and not row["device_peak_bytes"]:
                        row["ms_a_turn"] = 1e3 * row["seconds_a_step"] / case.spec["new_tokens"]
                        row["floor_ms"] = 1e3 * row["weight_bytes"] / found["machine"]["memory_bytes_per_second"]
                    found["sides"].append(row)
    return found


def difference(ours: float | list[int], theirs: float | list[int]) -> float:
    """Of two scores, in nats a token; of two continuations, in how many ids they differ."""
    if isinstance(ours, list) and isinstance(theirs, list):
        return sum(a != b for a, b in zip(ours, theirs, strict=True))
    assert isinstance(ours, float) and isinstance(theirs, float)
    return abs(ours - theirs)


def show(found: dict[str, Any], title: str, console: Console) -> None:
    table = Table(title=title, title_justify="left")
    for heading in ("workload", "side"):
        table.add_column(heading, no_wrap=True)
    for heading in ("tokens/s", "peak MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for side in found["sides"]:
        if "error" in side:
            table.add_row(side["workload"], side["side"], f"failed: {side['error'][:60]}")
            continue
        peak = (side["device_peak_bytes"] or side["peak_bytes"]) / 1e6
        table.add_row(side["workload"], side["side"], f"{side['tokens_per_second']:,.0f}", f"{peak:,.0f}")
    console.print(table)
    for side in found["sides"]:
        if "floor_ms" in side:
            console.print(
                f"{side['workload']}: a token of each row takes {side['side']} {side['ms_a_turn']:.3g} ms, reading "
                f"{side['weight_bytes'] / 1e6:,.0f} MB of weights from memory {side['floor_ms']:.3g} ms",
                highlight=False,
            )
    for duel in found["duels"]:
        line = f"{duel['workload']}: {duel['ours']} is {duel['ratio']:.2f} x as fast as {duel['theirs']}"
        console.print(f"{line}; results differ by {duel['difference']:.2g}", highlight=False)


def run(arguments: Reading, cases: Iterator[Case], task: str, title: str) -> dict[str, Any]:
    """A whole command: measures, shows, writes."""
    target = None if arguments.json is None else output.writable_file("--json", arguments.json)
    found = measure(arguments, cases, task, Console(stderr=True))
    machine.write_json(found, target)
    show(found, title, machine.wide_console())
    check_ours(found)
    return found
