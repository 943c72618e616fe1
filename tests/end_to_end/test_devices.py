"""A checkpoint doesn't know how many devices wrote it: it opens, and a run continues, on any number."""

from __future__ import annotations

import numpy as np
import pytest

from . import commands

LAYOUTS = {"data": {"parallel__data": 8}, "fsdp": {"parallel__fsdp": 8}}
OPEN = """
import sys, jax, lm, numpy as np
assert jax.device_count() == int(sys.argv[1]), jax.devices()
for path, file in zip(sys.argv[2::2], sys.argv[3::2]):
    run = lm.load(path)
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(run.params)}
    np.savez(file, **arrays, step=run.step, logits=run(np.arange(60).reshape(2, 30) % 256))
"""


@pytest.fixture(scope="module")
def runs(source, tmp_path_factory):
    """Ten steps on one device, and on eight in each layout; the learning rate is constant after the warmup."""
    folder = tmp_path_factory.mktemp("devices")

    def train(name, steps, devices, **changes):
        # batch 16 in two micro-batches: each of eight devices has a row of each
        arguments = commands.train(
            source, folder / name, training__steps=steps, training__batch_size=16, model__num_layers=1,
            optimizer__final_learning_rate=1.0, **changes,
        )  # fmt: skip
        return commands.succeed(arguments, devices=devices)

    commands.at_once(
        lambda: train("one", 20, 1),
        *(lambda name=name: train(name, 10, 8, **LAYOUTS[name]) for name in LAYOUTS),
    )
    train("fsdp", 20, 1)  # parallel.fsdp back at its default
    return folder


@pytest.fixture(scope="module")
def opened(runs, finished, tmp_path_factory):
    """What lm.load gives, with nothing but a path, on one device and on eight: {(run, devices): arrays}."""
    folder = tmp_path_factory.mktemp("opened")
    paths = {"finished": finished.workdir, **{name: runs / name / "checkpoints" / "10" for name in LAYOUTS}}

    def open_on(devices):
        files = {name: folder / f"{name}-{devices}.npz" for name in paths}
        pairs = [str(path) for name in paths for path in (paths[name], files[name])]
        commands.succeed(["-c", OPEN, str(devices), *pairs], devices=devices)
        return {(name, devices): dict(np.load(file)) for name, file in files.items()}

    one, eight = commands.at_once(lambda: open_on(1), lambda: open_on(8))
    return one | eight


@pytest.mark.parametrize("name", ["finished", *LAYOUTS])
def test_arrays_and_logits_are_the_same_on_one_device_and_on_eight(opened, name):
    one, eight = opened[name, 1], opened[name, 8]
    assert one.keys() == eight.keys() and len(one) > 10
    for leaf in one:
        np.testing.assert_array_equal(one[leaf], eight[leaf], err_msg=leaf)
    assert np.isfinite(one["logits"][..., :256]).all()


@pytest.mark.parametrize("name", LAYOUTS)
def test_eight_devices_train_as_one_does(runs, name):
    """1e-5: float32 sums in another order, ten steps apart."""
    ours, theirs = commands.losses(runs / name)[:10], commands.losses(runs / "one")[:10]
    assert [step for step, _ in ours] == [step for step, _ in theirs] == list(range(1, 11))
    np.testing.assert_allclose([loss for _, loss in ours], [loss for _, loss in theirs], rtol=1e-5)


def test_a_run_of_eight_devices_continues_on_one(runs):
    starts = [record["start"] for record in commands.records(runs / "fsdp") if "start" in record]
    assert [start["mesh"]["fsdp"] for start in starts] == [8, 1]
    assert [len(start["devices"]) for start in starts] == [8, 1]
    assert [start["resumed_from"] for start in starts] == [None, 10]
    assert commands.steps(runs / "fsdp") == [10, 20]
    ours, theirs = commands.losses(runs / "fsdp"), commands.losses(runs / "one")
    assert [step for step, _ in ours] == [step for step, _ in theirs] == list(range(1, 21))
    np.testing.assert_allclose([loss for _, loss in ours], [loss for _, loss in theirs], rtol=1e-5)
