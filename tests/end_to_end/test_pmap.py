"""`parallel.strategy pmap` is a whole run's strategy: the same numbers, the same files, and a run may change to it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from . import commands

PMAP, SPMD = {"parallel__strategy": "pmap"}, {"parallel__strategy": "spmd"}
STEPS = list(range(1, 21))


@pytest.fixture(scope="module")
def runs(source, tmp_path_factory):
    """Twenty steps on two devices: undisturbed, changed from pmap at step 10, and changed to it."""
    folder = tmp_path_factory.mktemp("pmap")

    def train(name, steps, strategy):
        # the learning rate is constant after the warmup: more steps don't change it
        arguments = commands.train(
            source, folder / name, training__steps=steps, training__ema_decay=0.9, model__num_layers=1,
            optimizer__final_learning_rate=1.0, evaluation__every_steps=10, evaluation__max_tokens=2000,
            checkpoint__every_steps=10, checkpoint__keep=None, **strategy,
        )  # fmt: skip
        return commands.succeed(arguments, devices=2)

    commands.at_once(lambda: train("undisturbed", 20, SPMD), lambda: train("from", 10, PMAP))
    shutil.copytree(
        folder / "undisturbed", folder / "to", ignore=lambda *_: ["20", "metrics.jsonl", "report.html", "eval.json"]
    )
    said = commands.at_once(lambda: train("from", 20, SPMD), lambda: train("to", 20, PMAP))
    for result, change in zip(said, ("'pmap' -> 'spmd'", "'spmd' -> 'pmap'"), strict=True):
        assert f"parallel.strategy: {change}" in result.stdout and "resuming from step 10" in result.stdout
    return folder


@pytest.mark.parametrize("name", ["from", "to"])
def test_numbers_are_those_of_the_undisturbed_run(runs, name):
    """1e-5 relative: float32 sums in another order."""
    wanted = commands.losses(runs / "undisturbed")
    assert [step for step, _ in wanted] == STEPS
    found = commands.losses(runs / name)
    assert [step for step, _ in found] == (STEPS if name == "from" else STEPS[10:])
    np.testing.assert_allclose(found, wanted[-len(found) :], rtol=1e-5)
    ours, theirs = (
        {record["step"]: record["eval/nats_per_token"] for record in commands.evaluations(runs / run)}
        for run in (name, "undisturbed")
    )
    assert theirs.keys() == {10, 20} and ours.keys() == ({10, 20} if name == "from" else {20})
    for step, nats in ours.items():
        assert nats == pytest.approx(theirs[step], rel=1e-5)


def test_a_checkpoint_is_laid_out_as_the_other_strategy_does_it(runs):
    """The same arrays, on the same mesh: pmap's own, of one axis, is in no file."""
    ours, theirs = (runs / name / "checkpoints" / "10" for name in ("from", "undisturbed"))
    for item in ("params", "raw_params", "opt_state", "rest"):
        assert (ours / item / "_METADATA").read_bytes() == (theirs / item / "_METADATA").read_bytes(), item
        assert meshes(ours / item) == meshes(theirs / item) != {}, item


def meshes(item):
    """Of each array by its name, the mesh that it was on."""
    places = {name: json.loads(place) for name, place in json.loads((item / "_sharding").read_text()).items()}
    return {name: (place["shape"], place["axis_names"]) for name, place in places.items()}


def test_a_part_of_the_devices_is_refused(source, tmp_path):
    result = commands.run(commands.train(source, tmp_path / "run", parallel__data=1, **PMAP), devices=2)
    assert result.status == 2 and "all 2 devices, but parallel.data is 1" in result.message
    assert not (tmp_path / "run").exists()
