"""The exchange of the training step, read from its HLO: nothing is computed but in the last test."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lm.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from lm.costs.collectives import collectives
from lm.data.packing import Batch
from lm.nn.language_model import model_specs
from lm.nn.params import is_spec
from lm.parallel import RULES, make_mesh, put_rows
from lm.training.lowering import lower_step
from lm.training.optimizer import make_optimizer
from lm.training.state import create_state

from .training.ten_steps import batch_at, run_config

LAYERS, VOCABULARY = 16, 640  # no other size here is a multiple of the vocabulary's half
LLAMA = ModelConfig(
    num_layers=LAYERS, d_model=128, num_heads=8, num_kv_heads=4, d_ff=384, norm="rmsnorm", activation="swiglu",
    positions="rotary", tie_embeddings=False, vocab_size=VOCABULARY - 5, compute_dtype="bfloat16", scan_layers=True,
    remat=True,
)  # fmt: skip
GPT2 = ModelConfig(
    num_layers=LAYERS, d_model=128, num_heads=8, bias=True, activation="gelu_tanh", vocab_size=VOCABULARY - 5,
    compute_dtype="bfloat16", scan_layers=True, remat=True,
)  # fmt: skip


def lowered(model: ModelConfig, parallel: ParallelConfig):
    """The step for 8 rows of 8 tokens, and its mesh: parameters are many, activations few."""
    cfg = RunConfig(
        model=model, data=DataConfig(context=8), training=TrainingConfig(batch_size=8), parallel=parallel
    ).resolve(VOCABULARY - 5)  # fmt: skip
    mesh = make_mesh(parallel)
    rows = NamedSharding(mesh, PartitionSpec(RULES["batch"]))
    ids, weights = (jax.ShapeDtypeStruct((8, 8), dtype, sharding=rows) for dtype in (jnp.int32, jnp.float32))
    optimizer = make_optimizer(cfg.optimizer, model_specs(cfg.model), mesh)
    return lower_step(cfg, optimizer, mesh, Batch(ids, ids, weights, ids, ids)), cfg, mesh


def sizes(cfg: RunConfig) -> tuple[int, int]:
    """Entries of the layers' matrices, and of the tables."""
    specs = [spec for spec in jax.tree.leaves(model_specs(cfg.model), is_leaf=is_spec) if spec.inputs is not None]
    layers = sum(math.prod(spec.shape) for spec in specs if spec.axes[0] == "layers")
    return layers, sum(math.prod(spec.shape) for spec in specs) - layers


def entries(found, kind: str, axis: str, mesh) -> int:
    """That all collectives of a kind work on, among those along one mesh axis. Entries, not bytes: XLA's CPU back end
    has no bfloat16 collectives and widens them."""
    width = {"bf16": 2, "f32": 4}
    mine = [one for one in found if one.kind == kind and one.axes(dict(mesh.shape)) == (axis,)]
    return sum(one.times * one.bytes // width[one.dtype] for one in mine)


@pytest.mark.parametrize("parallel", [ParallelConfig(fsdp=8), ParallelConfig(data=2, fsdp=4)], ids=["8", "2x4"])
def test_parameters_are_gathered_twice_and_gradients_scattered_once(parallel):
    """Textbook: an all-gather forward, one backward, a reduce-scatter of every parameter; within 10 %. Tables are
    gathered once: their gradients need no table."""
    low, cfg, mesh = lowered(LLAMA, parallel)
    asked = collectives(low.as_text("hlo"))
    assert {one.dtype for one in asked if one.kind == "all-gather"} == {"bf16"}, "the compute dtype"
    assert {one.dtype for one in asked if one.kind == "reduce-scatter"} == {"f32"}
    compiled = low.compile()
    found = collectives(compiled.as_text())
    layers, tables = sizes(cfg)
    gathered, scattered = (entries(found, kind, "fsdp", mesh) for kind in ("all-gather", "reduce-scatter"))
    assert gathered == pytest.approx(2 * layers + tables, rel=0.1)
    assert scattered == pytest.approx(layers + tables, rel=0.1)
    assert entries(found, "all-reduce", "fsdp", mesh) < 0.01 * layers, "vectors and scalars"
    across = entries(found, "all-reduce", "data", mesh)
    assert across == pytest.approx((layers + tables) / parallel.fsdp if parallel.data else 0, rel=0.1)
    whole = sum(one.times * one.bytes for one in found)
    assert whole == pytest.approx(4 * (gathered + scattered + across), rel=0.1), "and nothing else"

    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes < 4 * layers
    assert largest(compiled.as_text()) < layers / 3 / 2, "of the three matrices of a gated block no whole stack"


def largest(hlo: str) -> int:
    """Entries of the largest array of a program."""
    shapes = set(re.findall(r"\w\[([\d,]+)\]", hlo))
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("remat", [True, False])
def test_what_was_gathered_is_not_kept_for_the_backward_pass(scan, remat):
    """With and without recomputing activations, a layer is gathered again."""
    model = dataclasses.replace(LLAMA, num_layers=2, scan_layers=scan, remat=remat)
    for parallel in (ParallelConfig(fsdp=8), ParallelConfig(fsdp=4, tensor=2)):
        low, cfg, mesh = lowered(model, parallel)
        layers, tables = sizes(cfg)
        asked = collectives(low.as_text("hlo"))
        gathered, scattered = (entries(asked, kind, "fsdp", mesh) for kind in ("all-gather", "reduce-scatter"))
        assert gathered * parallel.tensor == 2 * layers + tables
        assert scattered * parallel.tensor == layers + tables


def test_tensor_parallel_devices_hold_parts_of_heads_hidden_units_and_logits():
    """Over `tensor` activations are summed, and no weight is gathered, nor logits."""
    low, cfg, mesh = lowered(GPT2, ParallelConfig(data=2, fsdp=2, tensor=2))
    text = low.compile().as_text()
    found = collectives(text)
    along = [one for one in found if "tensor" in one.axes(dict(mesh.shape))]
    assert along and {one.kind for one in along} == {"all-reduce"}
    # embedding; forward, again backward, and backward two a layer (the last of the second forward isn't needed); head
    rows = [one.times for one in along if any(math.prod(shape) == 2 * 8 * 128 for shape in one.shapes)]
    assert sum(rows) == 1 + 5 * LAYERS + 1
    layers, tables = sizes(cfg)
    assert entries(found, "all-gather", "fsdp", mesh) * 2 == pytest.approx(2 * layers + tables, rel=0.1)
    shapes = [tuple(map(int, shape.split(","))) for shape in set(re.findall(r"\w\[([\d,]+)\]", text))]
    assert any(VOCABULARY // 2 in shape for shape in shapes)
    assert not any(size % VOCABULARY == 0 for shape in shapes for size in shape), "nothing is as wide as the vocabulary"
    assert largest(text) < layers / 4 / 2


@pytest.mark.parametrize(
    ("dtype", "parallel", "tolerance"),
    [
        ("bfloat16", ParallelConfig(fsdp=4, tensor=2), 1e-2),
        ("float32", ParallelConfig(data=2, fsdp=2, tensor=2, rules=("embed=data+fsdp", "vocab=")), 1e-5),
    ],
    ids=["bfloat16", "other rules"],
)
def test_a_step_over_devices_is_that_of_one(one_device, dtype, parallel, tolerance):
    """Executed, with a tied head and biases: the same loss, and the same norm of the gradient, to rounding."""
    cfg = run_config("gpt2", compute_dtype=dtype, scan_layers=True)
    found = []
    for place, mesh in ((ParallelConfig(), one_device), (parallel, make_mesh(parallel))):
        on_mesh = dataclasses.replace(cfg, parallel=place)
        optimizer = make_optimizer(cfg.optimizer, model_specs(cfg.model), mesh)
        batch = put_rows(mesh, batch_at(0))
        step = lower_step(on_mesh, optimizer, mesh, batch).compile()
        found.append(step(create_state(on_mesh, optimizer, mesh), batch, np.float32(0))[1])
    np.testing.assert_allclose(found[1].nats, found[0].nats, rtol=tolerance / 10)
    np.testing.assert_allclose(found[1].grad_norm, found[0].grad_norm, rtol=tolerance)
