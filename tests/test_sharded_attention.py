"""Back ends over a mesh of fake devices: the reference's numbers, and nothing exchanged."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lm.config import InputError, ModelConfig, ParallelConfig
from lm.nn.attention_backend import BACKENDS
from lm.parallel import make_mesh
from lm.sharded_attention import bound, choice

from .nn.attention_cases import arrays, assert_equals_reference, compute, packed


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(ParallelConfig(data=2, fsdp=2, tensor=2))


def test_blockwise_equals_the_reference(mesh):
    q, k, v = arrays(20, 8, 4, B=4)
    assert_equals_reference(bound("blockwise", mesh), q, k, v, packed(4, 20, causal=True, window=7), softcap=2.0)


def test_splash_equals_the_reference(mesh):
    q, k, v = arrays(128, 4, 2, B=4)
    splash = bound("splash", mesh, interpret=True)
    assert_equals_reference(splash, q, k, v, packed(4, 128, causal=True, window=20), softcap=2.0)


def test_inside_of_a_step_that_is_split_by_rows_only_heads_are_left_to_split(mesh):
    q, k, v = arrays(20, 8, 4, B=4)
    mask = packed(4, 20, causal=True, window=7)
    rows, manual = PartitionSpec(("data", "fsdp")), frozenset({"data", "fsdp"})

    def local(q, k, v, ids):
        own = mask._replace(query_segments_BT=ids, key_segments_BS=ids)
        return compute(bound("blockwise", mesh, manual=manual), q, k, v, own)

    split = jax.shard_map(local, mesh=mesh, in_specs=(rows,) * 4, out_specs=rows, axis_names=manual, check_vma=False)
    compiled = jax.jit(split).lower(q, k, v, mask.query_segments_BT).compile()
    found = compiled(q, k, v, mask.query_segments_BT)
    np.testing.assert_allclose(found, compute(BACKENDS["reference"], q, k, v, mask), atol=1e-5)


def test_nothing_is_exchanged(mesh):
    """Rows and heads lie where the model's activations do."""
    heads = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor", None))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    q, k, v = (jax.device_put(x, heads) for x in arrays(20, 8, 4, B=4))
    mask = packed(4, 20, causal=True)

    def loss(q, k, v, ids):
        own = mask._replace(query_segments_BT=ids, key_segments_BS=ids)
        return compute(bound("blockwise", mesh), q, k, v, own)

    text = jax.jit(loss).lower(q, k, v, jax.device_put(mask.query_segments_BT, rows)).compile().as_text()
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter", text)


def test_a_kernel_of_another_device_is_refused(mesh):
    cfg = ModelConfig(attention="cudnn", compute_dtype="bfloat16")
    with pytest.raises(InputError, match="this is a cpu"):
        choice(cfg, mesh, length=64, training=True)
