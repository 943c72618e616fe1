"""A checkpoint knows no topology: what one mesh has written another reads, bit for bit, and training goes on there."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm import api, checkpoint
from lm.config import OptimizerConfig, ParallelConfig
from lm.data.tokenizer import ByteTokenizer
from lm.nn.language_model import model_specs
from lm.parallel import make_mesh, parameter_shardings, put_rows
from lm.training import replicated
from lm.training.lowering import lower_step
from lm.training.optimizer import make_optimizer
from lm.training.state import TrainState, abstract_state, create_state

from .training import ten_steps

pytestmark = pytest.mark.thorough

MESHES = {
    "one device": {"data": 1},
    "fsdp 8": {"fsdp": 8},
    "data 2, fsdp 2, tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "data 4, tensor 2": {"data": 4, "tensor": 2},
    "pmap": {"strategy": "pmap"},
}
PAIRS = [(one, other) for one in MESHES for other in MESHES if one != other]
RING = list(zip(MESHES, [*list(MESHES)[1:], *MESHES], strict=False))
OPTIMIZERS = {
    "adamw": OptimizerConfig(learning_rate=5e-3, warmup_steps=2),
    "muon": OptimizerConfig(name="muon", learning_rate=5e-3, warmup_steps=2),
    "adafactor": OptimizerConfig(name="adafactor", learning_rate=5e-3, warmup_steps=2),
}


def mesh_of(name):
    sizes = ParallelConfig(**MESHES[name])
    return make_mesh(sizes, jax.devices()[: 1 if name == "one device" else 8])


def config_of(optimizer, **model):
    config = ten_steps.run_config("llama", vocab_multiple=8, **model)
    averaged = dataclasses.replace(config.training, ema_decay=0.9 if optimizer == "adamw" else None)
    return dataclasses.replace(config, optimizer=OPTIMIZERS[optimizer], training=averaged)


def abstract(config, mesh):
    optimizer = make_optimizer(config.optimizer, model_specs(config.model), mesh)
    return abstract_state(config, optimizer, mesh).items(jax.ShapeDtypeStruct((), np.float64))


def filled(like, name):
    """Random bits in every array, the same wherever they are put: zeros would come back from any place.

    pmap's arrays are on a mesh of its own until they are to be saved.
    """
    draw = np.random.default_rng(0)
    pmaps = NamedSharding(Mesh(np.array(jax.devices()), (replicated.AXIS,)), PartitionSpec())

    def fill(leaf):
        value = draw.normal(size=leaf.shape).astype(leaf.dtype)
        if leaf.sharding is None:
            return value
        return jax.device_put(value, pmaps if name == "pmap" else leaf.sharding)

    items = jax.tree.map(fill, like)
    if name == "pmap":
        items = jax.tree.map(lambda x: replicated.on_mesh(x, mesh_of(name)) if isinstance(x, jax.Array) else x, items)
    return items


def write(folder, config, items):
    with checkpoint.CheckpointWriter(
        folder, config=config, save_tokenizer=ByteTokenizer().save, provenance={}, keep=None
    ) as writer:
        writer.save(1, items)
    return checkpoint.locate(folder)


def assert_same(found, expected):
    for (path, leaf), value in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(leaf).tobytes() == np.asarray(value).tobytes(), jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """{(optimizer, mesh): a checkpoint of random bits that it has written}, made when it is asked for."""
    made = {}

    def of(optimizer, name):
        if (optimizer, name) not in made:
            config = config_of(optimizer)
            items = filled(abstract(config, mesh_of(name)), name)
            made[optimizer, name] = write(tmp_path_factory.mktemp("written"), config, items), items
        return made[optimizer, name]

    return of


@pytest.mark.parametrize(
    ("optimizer", "before", "after"),
    [("adamw", *pair) for pair in PAIRS] + [(name, *pair) for name in ("muon", "adafactor") for pair in RING],
)
def test_another_mesh_reads_the_same_bits(written, optimizer, before, after):
    path, items = written(optimizer, before)
    wanted = abstract(config_of(optimizer), mesh_of(after))
    found = checkpoint.restore(path, wanted)
    assert_same(found, items)
    for leaf, like in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if like.sharding is None:
            continue
        assert leaf.sharding == like.sharding
        part = like.sharding.shard_shape(like.shape)
        assert {shard.data.shape for shard in leaf.addressable_shards} == {part}


@pytest.mark.parametrize("name", MESHES)
def test_a_reader_needs_the_path_alone(written, name):
    path, items = written("adamw", name)
    run = api.load(path)
    assert_same(run.params, items["params"])
    assert all(leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(run.params))


def test_a_reader_may_lay_the_parameters_out_over_a_mesh(written):
    path, items = written("adamw", "one device")
    mesh = mesh_of("data 2, fsdp 2, tensor 2")
    run = api.load(path, mesh=mesh)
    assert_same(run.params, items["params"])
    shardings = parameter_shardings(mesh, model_specs(run.config.model))
    assert jax.tree.map(lambda leaf: leaf.sharding, run.params) == shardings


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """Six losses of a run on a mesh, and a checkpoint of it after three."""
    folder = tmp_path_factory.mktemp("curves")
    config = config_of("adamw", num_layers=1, dropout=0.1)
    mesh = mesh_of("fsdp 8")
    put, step = stepping(config, mesh, "fsdp 8")
    state = create_state(config, make_optimizer(config.optimizer, model_specs(config.model), mesh), mesh)
    losses = []
    for n in range(6):
        if n == 3:
            write(folder, config, state.items(np.float64(1.0)))
        state, sums = step(state, put(mesh, ten_steps.batch_at(n)), np.float32(n / 10))
        losses.append(float(sums.nats / sums.tokens))
    return config, checkpoint.locate(folder), losses


@pytest.mark.parametrize("name", ["one device", "data 2, fsdp 2, tensor 2", "pmap"])
def test_training_goes_on_elsewhere(curves, name):
    """1e-5: float32 sums in another order, three steps apart."""
    config, path, losses = curves
    mesh = mesh_of(name)
    put, step = stepping(config, mesh, name)
    state = TrainState.of_items(checkpoint.restore(path, abstract(config, mesh)))
    for n in range(3, 6):
        state, sums = step(state, put(mesh, ten_steps.batch_at(n)), np.float32(n / 10))
        assert float(sums.nats / sums.tokens) == pytest.approx(losses[n], rel=1e-5)


def stepping(config, mesh, name):
    """How batches are placed, and the step of a run that takes them."""
    config = dataclasses.replace(config, parallel=ParallelConfig(**MESHES[name]))
    optimizer = make_optimizer(config.optimizer, model_specs(config.model), None if name == "pmap" else mesh)
    step = lower_step(config, optimizer, mesh, put_rows(mesh, ten_steps.batch_at(0))).compile()
    return replicated.put_replicas if name == "pmap" else put_rows, step
