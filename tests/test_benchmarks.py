"""The measurements: sides that take turns, what is refused, and our own sides on small models."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from benchmarks import reading, workloads
from benchmarks.sides import ours_reading, ours_training
from benchmarks.training import Training, best, configs_of, measure, run, show
from benchmarks.turns import Entry, Turns, beside
from benchmarks.workloads import Workload
from lm.config import InputError
from lm.nn.language_model import model_specs
from lm.nn.params import count

ROOT = Path(__file__).parents[1]
SMALL = Workload(layers=1, heads=2, width=16, context=16, vocabulary=65, batch_size=2)


def entry(name: str, seconds: float = 0.001, fails: str | None = None) -> Entry:
    return Entry(name, "tests.fake_side", {"seconds": seconds, "fails": fails}, dict(os.environ))


def rows(ours: list[Entry], theirs: list[Entry]) -> list[dict]:
    return list(beside(ours, theirs, Console(file=io.StringIO()), "", Turns(3, 0.05)))


def test_a_side_that_takes_twice_as_long_is_half_as_fast():
    found = rows([entry("ours", 0.03)], [entry("theirs", 0.06)])
    (duel,) = [row for row in found if "ratio" in row]
    assert duel["ours"] == "ours" and duel["theirs"] == "theirs"
    assert 1.5 < duel["ratio"] < 2.6  # sleeping is not exact
    sides = {row["side"]: row for row in found if "side" in row}
    assert 0.03 <= sides["ours"]["seconds_a_step"] < 0.06 <= sides["theirs"]["seconds_a_step"] < 0.09
    assert len(sides["ours"]["turns"]) == 3 and sides["ours"]["peak_bytes"] > 10**6


@pytest.mark.parametrize("fails, said", [("start", "no such thing here"), ("step", "too large a step")])
def test_a_side_that_fails_is_told_and_the_others_go_on(fails, said):
    found = rows([entry("ours")], [entry("broken", fails=fails), entry("whole")])
    (failed,) = [row for row in found if "error" in row]
    assert failed["side"] == "broken" and said in failed["error"]
    assert [row["theirs"] for row in found if "ratio" in row] == ["whole"]


def test_the_best_of_each_peer_counts():
    pairs = [("ours a", "p x", 3.0), ("ours b", "p x", 4.0), ("ours a", "p y", 1.5), ("ours b", "p y", 1.2)]
    duels = [{"workload": "W", "allocator": "default", "ours": a, "theirs": b, "ratio": r} for a, b, r in pairs]
    seconds = {"ours a": 1.0, "ours b": 1.0, "p x": 3.0, "p y": 1.4}
    sides = [{"workload": "W", "allocator": "default", "side": s, "seconds_a_step": t} for s, t in seconds.items()]
    (row,) = best({"sides": sides, "duels": duels})
    assert (row["ours"], row["theirs"], row["ratio"]) == ("ours a", "p y", 1.5)


def test_training_is_measured_with_memory_and_versions(monkeypatch):
    monkeypatch.setitem(workloads.WORKLOADS, "W1", SMALL)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    arguments = Training(
        workloads=("W1",), transformers=False, dtypes=("float32",), rounds=2, turn_seconds=0.001, packed=True
    )
    found = json.loads(json.dumps(measure(arguments, Console(file=io.StringIO()))))
    (side,) = found["sides"]
    assert "error" not in side, side
    assert side["tokens_per_second"] == pytest.approx(32 / side["seconds_a_step"])
    assert side["bytes_above_state"] == side["peak_bytes"] - 16 * side["parameters"]
    assert found["machine"]["versions"]["jax"] and found["machine"]["cores"]
    console = Console(file=io.StringIO(), width=160)
    show(found, console)
    assert "ours float32" in console.file.getvalue()


def test_packed_rows_are_pieces_counted_from_0():
    ids = np.zeros((4, 64), np.int64)
    batch = ours_training.batch_of(ids, ids, packed=True)
    assert batch.segments_BT.max() > 2 and batch.segments_BT.min() == 1
    begins = np.diff(batch.segments_BT, axis=1, prepend=0) == 1
    assert np.array_equal(batch.positions_BT == 0, begins)
    assert ours_training.batch_of(ids, ids, packed=False).segments_BT.max() == 1


def test_our_reading_sides_score_and_continue(monkeypatch, tmp_path):
    monkeypatch.setitem(workloads.WORKLOADS, "W1", SMALL)
    folder = reading.model_folder(reading.Reading(), "W1", tmp_path)
    np.save(tmp_path / "ids.npy", np.arange(40, dtype=np.int32))
    spec = {"folder": str(folder), "ids": str(tmp_path / "ids.npy"), "dtype": "float32"}
    score = ours_reading.build({**spec, "task": "evaluation", "window": 15, "stride": 7, "batch_size": 2})
    assert score.facts["result"] == pytest.approx(np.log(65), rel=0.05)  # drawn at random: as good as uniform
    np.save(tmp_path / "ids.npy", np.arange(8, dtype=np.int32).reshape(2, 4))
    new = ours_reading.build({**spec, "task": "generation", "new_tokens": 5})
    assert len(new.facts["result"]) == 5 and all(0 <= one < 65 for one in new.facts["result"])
    # Each token reads all weights whole but the table of positions; the vocabulary's is the head too.
    config = SMALL.config().model
    assert new.facts["weight_bytes"] == 4 * (new.facts["parameters"] - config.position_rows * config.d_model)


def test_the_workloads_for_a_gpu_are_the_presets_model_and_longer_rows():
    arguments = Training(context=1024, batch_size=8, dtypes=("bfloat16",), attention=("auto", "reference"))
    (_, w3), (name, reference) = configs_of(arguments, "W3")
    assert (w3.data.context, w3.model.max_positions, w3.training.batch_size) == (1024, 1024, 8)
    assert name == "bfloat16, reference attention" and reference.model.attention == "reference"
    (_, llama), _ = configs_of(arguments, "llama_1b")
    assert count(model_specs(llama.model)) == 1_235_814_400 and llama.training.gradient_accumulation == 1


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"workloads": ("W9",)}, "did you mean 'W3'"),
        ({"nanogpt": "/nowhere"}, "--nanogpt /nowhere"),
        ({"nanodo": "/nowhere"}, "--nanodo /nowhere"),
        ({"rounds": 0}, "--rounds is 0"),
        ({"dtypes": ()}, "--dtypes is empty"),
        ({"attention": ("flash",)}, "model.attention"),
        ({"allocators": ("jemalloc",), "jemalloc": "/nowhere.so"}, "--jemalloc /nowhere.so"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(wrong, said):
    with pytest.raises(InputError, match=said.replace(".", r"\.")):
        run(dataclasses.replace(Training(transformers=False), **wrong))


def test_the_command_ends_with_2_and_one_message():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "trainning"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "did you mean 'training'" in done.stderr and "Traceback" not in done.stderr
