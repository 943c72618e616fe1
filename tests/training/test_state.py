"""The state: averaged weights, steps that are skipped, and what a checkpoint of it holds."""

from __future__ import annotations

import dataclasses
import math
import re
import types

import jax
import numpy as np
import pytest

from lm import checkpoint
from lm.checkpoint import CheckpointWriter
from lm.config import InputError, OptimizerConfig, ParallelConfig
from lm.nn.language_model import model_specs
from lm.parallel import make_mesh, put_rows
from lm.training import loop
from lm.training.budget import Budget
from lm.training.optimizer import make_optimizer
from lm.training.run import _initial_state
from lm.training.state import Skipped, TrainState, abstract_state, lower_state
from lm.training.step import Sums

from .ten_steps import batch_at, compiled, run_config


@pytest.fixture(scope="module")
def averaging(one_device):
    """A config of Muon with averaged weights, its step, and the state before it."""
    cfg = run_config("bare")
    cfg = dataclasses.replace(
        cfg,
        training=dataclasses.replace(cfg.training, ema_decay=0.2),
        optimizer=OptimizerConfig(name="muon", learning_rate=1e-2, warmup_steps=2, newton_schulz_steps=2),
    )
    return cfg, *compiled(cfg, one_device)


def test_a_state_is_born_in_its_places():
    """Nowhere in the program that draws it is a whole stack of layers. Averages lie as the weights do, and Adafactor's
    sums along one axis as what is left of them."""
    model = run_config("llama").model
    model = dataclasses.replace(model, num_layers=8, d_model=128, d_ff=256, head_dim=32, vocab_multiple=8)
    parallel = ParallelConfig(data=2, fsdp=2, tensor=2)
    cfg = dataclasses.replace(run_config("llama"), model=model, parallel=parallel)
    cfg = dataclasses.replace(
        cfg,
        training=dataclasses.replace(cfg.training, ema_decay=0.9),
        optimizer=OptimizerConfig(name="adafactor"),
    )
    mesh = make_mesh(parallel)
    optimizer = make_optimizer(cfg.optimizer, model_specs(cfg.model), mesh)
    text = lower_state(cfg, optimizer, mesh).compile().as_text()
    sizes = {math.prod(map(int, shape.split(","))) for shape in re.findall(r"\w\[([\d,]+)\]", text)}
    assert max(sizes) == 8 * 128 * 256 // 4, "of the feed-forward block a quarter, which a device holds"

    state = abstract_state(cfg, optimizer, mesh)
    moments = state.opt_state[1][0]
    for name in ("up", "down"):
        matrix = state.params["layers"]["feed_forward"][name]
        for moment in (tree["layers"]["feed_forward"][name] for tree in (moments.v_row, moments.v_col)):
            assert moment.shape in ((8, 128), (8, 256))
            assert moment.sharding.spec[1] == matrix.sharding.spec[matrix.shape.index(moment.shape[1])]
    for average, weight in zip(jax.tree.leaves(state.ema), jax.tree.leaves(state.params), strict=True):
        assert average.sharding == weight.sharding


def run(step, state, steps, mesh):
    for n in steps:
        state, _ = step(state, put_rows(mesh, batch_at(n)), np.float32(n / 10))
    return state


def assert_same_bits(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_the_average_follows_the_weights(averaging, one_device):
    """d = min(0.2, (1 + n) / (10 + n)): 0.1, 2/11 and from the third step on 0.2."""
    _, step, state = averaging
    wanted = jax.tree.map(np.asarray, state.params)
    for n, decay in enumerate((0.1, 2 / 11, 0.2, 0.2)):
        state = run(step, state, [n], one_device)
        wanted = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, wanted, jax.tree.map(np.asarray, state.params))
    for a, b, raw in zip(*map(jax.tree.leaves, (state.ema, wanted, state.params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
        assert raw.ndim < 2 or np.abs(a - raw).max() > 1e-6
    assert state.evaluated is state.ema


def save(state, cfg, folder, drop=()):
    items = state.items(np.float64(1.5))
    items["rest"] = {name: value for name, value in items["rest"].items() if name not in drop}
    with CheckpointWriter(folder, config=cfg, save_tokenizer=None, provenance={}, keep=None) as writer:
        writer.save(int(state.step), items)
    return checkpoint.locate(folder)


def restored(path, cfg, mesh):
    start = types.SimpleNamespace(config=cfg, resume_from=path, step=checkpoint.read_manifest(path).step)
    return _initial_state(start, make_optimizer(cfg.optimizer, model_specs(cfg.model), mesh), mesh)


def test_a_run_goes_on_from_the_raw_weights_and_a_reader_gets_the_average(averaging, one_device, tmp_path):
    """Bit for bit the run that never stopped."""
    cfg, step, state = averaging
    half = run(step, state, range(2), one_device)
    path = save(half, cfg, tmp_path / "run")
    again, seconds = restored(path, cfg, one_device)
    assert seconds == 1.5
    assert_same_bits(again, half)
    assert_same_bits(run(step, again, range(2, 4), one_device), run(step, half, range(2, 4), one_device))
    assert_same_bits(checkpoint.load(tmp_path / "run").params, half.ema)


def test_a_checkpoint_from_before_the_counts_opens(one_device, tmp_path):
    cfg = run_config("bare")
    _, state = compiled(cfg, one_device)
    path = save(state, cfg, tmp_path / "run", drop=("skipped", "skipped_in_a_row"))
    assert sorted(entry.name for entry in path.iterdir() if entry.is_dir()) == ["opt_state", "params", "rest"]
    assert_same_bits(restored(path, cfg, one_device)[0], state)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_step_that_is_not_finite_changes_the_counts_alone(averaging, one_device, bad):
    _, step, state = averaging
    state = run(step, state, [0], one_device)
    spoilt = batch_at(1)
    spoilt = spoilt._replace(weights_BT=np.where(spoilt.weights_BT > 0, bad, 0).astype(np.float32))
    after, sums = step(state, put_rows(one_device, spoilt), np.float32(0))
    assert not np.isfinite(sums.objective) and sums.skipped == after.skipped == (1, 1)
    assert_same_bits(after._replace(step=state.step, skipped=state.skipped), state)
    twice, _ = step(after, put_rows(one_device, spoilt), np.float32(0))
    assert twice.skipped == (2, 2) and int(twice.step) == int(state.step) + 2
    good, _ = step(twice, put_rows(one_device, batch_at(1)), np.float32(0))
    assert good.skipped == (2, 0)


def test_too_many_such_steps_in_a_row_end_the_run_after_saving():
    """A step by hand: the 3rd, and from the 6th on all, are not finite; two in a row are allowed."""
    cfg = run_config("bare")
    cfg = dataclasses.replace(cfg, training=dataclasses.replace(cfg.training, max_skipped_steps=2))
    saved, lines = [], []

    def step(state, batch, progress):
        bad = state.step in (2, 5, 6, 7, 8, 9)
        skipped = Skipped(state.skipped.total + bad, (state.skipped.in_a_row + 1) * bad)
        value = np.float32(np.nan if bad else 1.0)
        state = state._replace(step=state.step + 1, skipped=skipped)
        return state, Sums(value, value, np.float32(1), value, np.float32(1), skipped)

    hands = loop.Hands(step, iter(range(100)), lambda params: {}, lambda n, *_: saved.append(n), lines.append)
    with pytest.raises(InputError, match=r"more than 2 steps in a row.*saved as step 9.*learning_rate"):
        loop.train(
            TrainState(0, {}, {}), 0, 0.0, np.inf, cfg=cfg, budget=Budget(50, None, 0), hands=hands,
            tokens_per_step=1, flops_per_token=1.0, peak_flops=None,
            stop=types.SimpleNamespace(noted=None, signal=None),
        )  # fmt: skip
    assert saved == [9], "the third in a row is the 8th step, known when the 9th is under way"
    assert [line["train/skipped"] for line in lines] == [0, 0, 1, 1, 1, 2, 3, 4, 5]
