"""The pmap route: what a run asks of the other one it does too, and what it can't is refused."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from lm.config import InputError, OptimizerConfig, ParallelConfig, RunConfig
from lm.nn.language_model import model_specs
from lm.parallel import make_mesh, put_rows
from lm.training import transfers
from lm.training.optimizer import make_optimizer
from lm.training.replicated import check_devices, on_mesh, put_replicas
from lm.training.state import abstract_state, create_state
from lm.validation import validate

from .ten_steps import as_in_a_run, batch_at, losses, run_config

PMAP = ParallelConfig(strategy="pmap")


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(PMAP)


@pytest.fixture(scope="module")
def route(mesh):
    """A config with a moving average and dropout, and its compiled step."""
    cfg = run_config("bare", dropout=0.1)
    cfg = dataclasses.replace(cfg, parallel=PMAP, training=dataclasses.replace(cfg.training, ema_decay=0.9))
    step, *_ = as_in_a_run(cfg, mesh)
    return cfg, step


def fresh(cfg, mesh):
    return create_state(cfg, make_optimizer(cfg.optimizer, model_specs(cfg.model)), mesh)


def pointers(array):
    return [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]


def test_every_device_gets_the_rows_of_the_other_route(mesh):
    batch = batch_at(0)
    ours, theirs = put_replicas(mesh, batch), put_rows(mesh, batch)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.shape == (8, 2, 24)
        of_device = {shard.device: shard.data for shard in b.addressable_shards}
        for shard in a.addressable_shards:
            np.testing.assert_array_equal(shard.data[0], of_device[shard.device])


def test_the_state_is_donated_keeps_its_shapes_and_needs_no_hidden_transfer(route, mesh):
    cfg, compiled = route
    step = transfers.placing_progress(compiled, mesh)
    state = fresh(cfg, mesh)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    before = jax.tree.leaves((state.params, state.opt_state, state.ema))
    batches = [put_replicas(mesh, batch_at(n)) for n in range(2)]
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes == held, "the new state takes the place of the old one"
    with transfers.none_hidden(mesh):
        for n, batch in enumerate(batches):
            state, _ = step(state, batch, np.float32(n))
    assert all(leaf.is_deleted() for leaf in before)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes
    assert int(state.step) == 2


def test_a_state_comes_to_the_mesh_without_a_copy(route, mesh):
    cfg, compiled = route
    state, sums = compiled(fresh(cfg, mesh), put_replicas(mesh, batch_at(0)), np.float32(0))
    assert float(sums.tokens) == batch_at(0).weights_BT.sum()
    placed = on_mesh(state, mesh)
    wanted = abstract_state(cfg, make_optimizer(cfg.optimizer, model_specs(cfg.model)), mesh)
    for a, b, like in zip(*map(jax.tree.leaves, (placed, state, wanted)), strict=True):
        assert pointers(a) == pointers(b)
        assert a.sharding.mesh == mesh and a.sharding.is_equivalent_to(like.sharding, a.ndim)
    assert all(a is b for a, b in zip(jax.tree.leaves(on_mesh(placed, mesh)), jax.tree.leaves(placed), strict=True))
    compiled(
        state, put_replicas(mesh, batch_at(1)), np.float32(0)
    )  # what was placed doesn't keep it from being donated
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_a_step_that_is_not_finite_on_one_device_changes_nothing_on_any(route, mesh):
    cfg, compiled = route
    state = fresh(cfg, mesh)
    wanted = jax.tree.map(np.array, state)
    spoilt = batch_at(1)
    weights_BT = spoilt.weights_BT.copy()
    weights_BT[-1, 0] = np.nan
    assert spoilt.segments_BT[-1, 0]
    state, sums = compiled(state, put_replicas(mesh, spoilt._replace(weights_BT=weights_BT)), np.float32(0))
    assert not np.isfinite(sums.nats) and state.skipped == sums.skipped == (1, 1) and int(state.step) == 1
    for part in ("params", "opt_state", "ema"):
        for leaf, same in zip(*(jax.tree.leaves(getattr(of, part)) for of in (state, wanted)), strict=True):
            for shard in leaf.addressable_shards:
                np.testing.assert_array_equal(shard.data, same)


def test_the_average_is_that_of_the_other_route(route, mesh):
    """1e-5: float32 sums in another order, three steps apart; the absolute part is for what is near 0."""
    cfg, compiled = route
    spmd = dataclasses.replace(cfg, parallel=ParallelConfig())
    other, put, theirs = as_in_a_run(spmd, mesh)
    ours = fresh(cfg, mesh)
    for n in range(3):
        ours, _ = compiled(ours, put_replicas(mesh, batch_at(n)), np.float32(0))
        theirs, _ = other(theirs, put(mesh, batch_at(n)), np.float32(0))
    for a, b in zip(*map(jax.tree.leaves, (ours.ema, theirs.ema)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_muon_trains_as_on_one_device(mesh, one_device):
    """1e-4 relative: Newton-Schulz multiplies the rounding of the sums over devices."""
    cfg = dataclasses.replace(run_config("gpt2"), optimizer=OptimizerConfig(name="muon", learning_rate=5e-3))
    ours = losses(dataclasses.replace(cfg, parallel=PMAP), mesh)
    np.testing.assert_allclose(ours, losses(cfg, one_device), rtol=1e-4)


@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_axes_other_than_data_are_refused(axis):
    config = RunConfig(parallel=ParallelConfig(strategy="pmap", **{axis: 2}))
    with pytest.raises(InputError, match=rf"'pmap'.*parallel\.{axis} is 2: set it to 1, or parallel\.strategy"):
        validate(config)


def test_rules_are_refused():
    """By embed=data the state would be split."""
    with pytest.raises(InputError, match=r"'pmap'.*parallel\.rules is \('embed=data',\): leave them out"):
        validate(RunConfig(parallel=ParallelConfig(strategy="pmap", rules=("embed=data",))))


def test_a_part_of_the_devices_is_refused():
    few = ParallelConfig(strategy="pmap", data=4)
    with pytest.raises(InputError, match=r"all 8 devices, but parallel\.data is 4: leave it at None"):
        check_devices(few, make_mesh(few), 8)
    check_devices(dataclasses.replace(few, strategy="spmd"), make_mesh(few), 8)
    check_devices(dataclasses.replace(few, data=8), make_mesh(dataclasses.replace(few, data=8)), 8)
