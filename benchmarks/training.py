"""How fast a model trains here and on peers: each of their variants beside ours, in turns, step by step the same work.

    python -m benchmarks training --workloads W1 W2 W3 --nanogpt DIR --nanodo DIR --json training.json

On a GPU: --workloads W3 llama_1b --context 1024 --batch-size 16 [--packed True] [--attention auto reference]
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.machine import Allocator, Dtype
from benchmarks.turns import Entry, Turns, beside, check_ours
from benchmarks.workloads import Workload, workload
from lm import output
from lm.config import InputError, RunConfig
from lm.validation import validate

LLAMA = "llama_1b"
LLAMA_SHAPE = Workload(layers=0, heads=0, width=0, context=2048, vocabulary=128_256, batch_size=4)  # and the preset's
STATE_BYTES = 16
"""A parameter with its gradient and AdamW's two moments, in float32."""


@dataclasses.dataclass(frozen=True)
class Training:
    """Measures training, here and on each peer that is installed or whose checkout is named: tokens a second, memory,
    and how many times as fast ours is. Sides take turns; a figure is the median of its turns, a ratio that of pairs."""

    workloads: tuple[str, ...] = ("W1", "W2", "W3")
    """Of W1 (nanoGPT on a CPU), W2 (on a GPU, few rows), W3 (GPT-2 small) and llama_1b (the preset, ours
    alone)."""
    nanogpt: str | None = None
    """A checkout of nanoGPT. None: it is left out."""
    nanodo: str | None = None
    """A checkout of nanodo. None: it is left out."""
    transformers: bool = True
    """GPT-2 of transformers in torch, where both are installed."""
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    """Of both sides; the better one of each counts. In torch bfloat16 is autocast."""
    compile: tuple[bool, ...] = (False, True)
    """Whether torch.compile is on; the better counts."""
    allocators: tuple[Allocator, ...] = ("default",)
    """Settings for both sides: default, as a user gets it who asks for nothing; huge_pages of glibc; jemalloc."""
    jemalloc: str | None = None
    """The library for the jemalloc setting. None: an installed one."""
    context: int | None = None
    """Row length in tokens, in place of the workload's own."""
    batch_size: int | None = None
    """Rows in a batch, in place of the workload's own."""
    packed: bool = False
    """Our rows hold about eight documents each, which don't see one another; the peers' rows hold one."""
    attention: tuple[str, ...] = ("auto",)
    """Attention back ends of ours to compare, as model.attention takes them."""
    rounds: int = 7
    """Turns of each side."""
    turn_seconds: float = 1.0
    """How long a turn takes, at least a step."""
    json: str | None = None
    """Also write the figures to this file."""


def measure(arguments: Training, console: Console) -> dict[str, Any]:
    """All figures. Raises InputError on arguments that don't fit, before anything runs."""
    peers = peers_of(arguments)
    configs = {name: configs_of(arguments, name) for name in arguments.workloads}
    environments = {
        each: machine.allocator_environment(each, arguments.jemalloc) | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        for each in arguments.allocators
    }
    found: dict[str, Any] = {"machine": machine.describe(), "arguments": dataclasses.asdict(arguments)}
    found["checkouts"] = {peer: machine.commit(at) for peer, (_, at) in peers.items() if at is not None}
    found["sides"], found["duels"] = [], []
    turns = Turns(arguments.rounds, arguments.turn_seconds)
    for name, allocator in ((name, each) for name in arguments.workloads for each in arguments.allocators):
        shape, environment = shape_of(arguments, name), environments[allocator]
        ours = list(our_entries(arguments, configs[name], shape, environment))
        theirs = [] if name == LLAMA else list(peer_entries(arguments, peers, shape, environment))
        for row in beside(ours, theirs, console, f"{name}, {allocator}", turns):
            kind = "duels" if "ratio" in row else "sides"
            found[kind].append({"workload": name, "allocator": allocator, **row})
    for side in found["sides"]:
        if "error" not in side:
            side.update(derived(side, shape_of(arguments, side["workload"]).tokens))
    return found


def shape_of(arguments: Training, name: str) -> Workload:
    """The workload as the command line wants it; of llama_1b the batch alone counts."""
    shape = LLAMA_SHAPE if name == LLAMA else workload(name, also=(LLAMA,))
    given = {field: getattr(arguments, field) for field in ("context", "batch_size")}
    return dataclasses.replace(shape, **{field: size for field, size in given.items() if size is not None})


def configs_of(arguments: Training, name: str) -> list[tuple[str, RunConfig]]:
    """Our variants of a workload, by name."""
    shape, variants = shape_of(arguments, name), []
    if name == LLAMA:
        from lm.api import preset

        training = dataclasses.replace(preset(name).training, batch_size=shape.batch_size, gradient_accumulation=1)
        data = dataclasses.replace(preset(name).data, context=shape.context)
        config = dataclasses.replace(preset(name), training=training, data=data).resolve(shape.vocabulary)
    else:
        config = shape.config()
    for dtype in arguments.dtypes:
        for attention in arguments.attention:
            model = dataclasses.replace(config.model, compute_dtype=dtype, attention=attention)  # type: ignore[arg-type]
            variant = dtype if attention == "auto" else f"{dtype}, {attention} attention"
            variants.append((variant, validate(dataclasses.replace(config, model=model))))
    return variants


def peers_of(arguments: Training) -> dict[str, tuple[str, str | None]]:
    """The peers to measure: {name: (the module of its process, checkout)}."""
    found: dict[str, tuple[str, str | None]] = {}
    torch = importlib.util.find_spec("torch") is not None
    for name, checkout, file in (
        ("nanoGPT", arguments.nanogpt, "model.py"),
        ("nanodo", arguments.nanodo, "nanodo/model.py"),
    ):
        if checkout is None:
            continue
        if not (Path(checkout) / file).is_file():
            raise InputError(f"--{name.lower()} {checkout}: no checkout of {name}, which has a file {file}")
        if name == "nanoGPT" and not torch:
            raise InputError("--nanogpt needs the package torch: install lm[parity], or leave it out")
        found[name] = (f"benchmarks.sides.{name.lower()}", str(Path(checkout).absolute()))
    if arguments.transformers and torch and importlib.util.find_spec("transformers") is not None:
        found["transformers"] = ("benchmarks.sides.transformers_gpt2", None)
    return found


def our_entries(
    arguments: Training, configs: list[tuple[str, RunConfig]], shape: Workload, environment: dict[str, str]
) -> Iterator[Entry]:
    for variant, config in configs:
        spec = {
            "task": "training",
            "config": config.to_json(),
            "workload": dataclasses.asdict(shape),
            "packed": arguments.packed,
        }
        yield Entry(f"ours {variant}", "benchmarks.sides.ours", spec, environment)


def peer_entries(
    arguments: Training, peers: dict[str, tuple[str, str | None]], shape: Workload, environment: dict[str, str]
) -> Iterator[Entry]:
    for peer, (module, checkout) in peers.items():
        for dtype in arguments.dtypes:
            for compiled in (False,) if peer == "nanodo" else arguments.compile:
                name = f"{peer} {dtype}{', compiled' if compiled else ''}"
                spec = {"workload": dataclasses.asdict(shape), "dtype": dtype, "compile": compiled}
                yield Entry(name, module, spec | {"checkout": checkout}, environment)


def derived(side: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Tokens a second, memory above that of the state, and MFU where the device's peak is known."""
    rate = tokens / side["seconds_a_step"]
    peak = side["device_peak_bytes"] or side["peak_bytes"]
    known = side.get("peak_flops")
    return {
        "tokens_per_second": rate,
        "bytes_above_state": peak - STATE_BYTES * side["parameters"],
        "mfu": rate * side["flops_per_token"] / known if known else None,
    }


def best(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of each peer, in each setting, its fastest variant beside the fastest of ours."""
    seconds = {(s["workload"], s["allocator"], s["side"]): s.get("seconds_a_step") for s in found["sides"]}
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for duel in found["duels"]:
        groups.setdefault((duel["workload"], duel["allocator"], duel["theirs"].split()[0]), []).append(duel)
    for (name, allocator, _), duels in groups.items():
        fastest = min({duel["theirs"] for duel in duels}, key=lambda theirs: seconds[name, allocator, theirs])
        yield max((duel for duel in duels if duel["theirs"] == fastest), key=lambda duel: duel["ratio"])


def show(found: dict[str, Any], console: Console) -> None:
    """The tables."""
    table = Table(title="A training step (medians)", title_justify="left")
    for heading in ("workload", "allocator", "side"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ms", "tokens/s", "peak MB", "above state MB", "MFU"):
        table.add_column(heading, justify="right", no_wrap=True)
    for side in found["sides"]:
        names = [side["workload"], side["allocator"], side["side"]]
        if "error" in side:
            table.add_row(*names, f"failed: {side['error'][:60]}")
            continue
        peak = side["device_peak_bytes"] or side["peak_bytes"]
        figures = [f"{1e3 * side['seconds_a_step']:,.1f}", f"{side['tokens_per_second']:,.0f}", f"{peak / 1e6:,.0f}"]
        mfu = "" if side["mfu"] is None else f"{100 * side['mfu']:.1f} %"
        table.add_row(*names, *figures, f"{side['bytes_above_state'] / 1e6:,.0f}", mfu)
    console.print(table)
    for duel in best(found):
        line = f"{duel['workload']}, {duel['allocator']}: {duel['ours']} is {duel['ratio']:.2f} x as fast as "
        console.print(line + duel["theirs"], highlight=False)


def run(arguments: Training) -> dict[str, Any]:
    """The command: measures, shows, writes."""
    machine.check_counts(arguments)
    target = None if arguments.json is None else output.writable_file("--json", arguments.json)
    found = measure(arguments, Console(stderr=True))
    machine.write_json(found, target)
    show(found, machine.wide_console())
    check_ours(found)
    return found
