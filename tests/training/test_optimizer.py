"""Every optimizer learns, on a mesh too, and the groups of parameters have their own learning rates."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from lm.config import OptimizerConfig, ParallelConfig
from lm.nn import params
from lm.nn.language_model import model_specs
from lm.parallel import make_mesh
from lm.training.optimizer import group, make_optimizer

from .ten_steps import losses, run_config

RATES = {"muon": 1e-2, "lion": 2e-3, "adafactor": 5e-2, "sgd": 0.3}


@pytest.mark.parametrize("name", RATES)
def test_every_optimizer_lowers_the_loss(name):
    """Ten steps, the state split over four devices: from ln 61 by 0.2 nats and more. AdamW's are the golden losses."""
    optimizer = OptimizerConfig(name=name, learning_rate=RATES[name], warmup_steps=2)
    cfg = run_config("bare", vocab_size=61, num_layers=1, zero_init_outputs=name == "muon")
    parallel = ParallelConfig(data=1, fsdp=4)
    found = losses(dataclasses.replace(cfg, optimizer=optimizer, parallel=parallel), make_mesh(parallel))
    assert np.isfinite(found).all() and found[-1] < found[0] - 0.2, found


def update(cfg, specs):
    draw = np.random.default_rng(0)
    grads = params.map_specs(lambda s: draw.normal(size=s.shape).astype(np.float32), specs)
    optimizer = make_optimizer(cfg, specs)
    return optimizer.update(grads, optimizer.init(grads), grads)[0]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_groups_have_their_own_learning_rates(name):
    """Tables, an untied head, vectors and the layers' matrices; weight decay goes with the learning rate."""
    specs = model_specs(run_config("tutorial").model)
    groups = {jax.tree_util.keystr(path): group(spec) for path, spec in spec_leaves(specs)}
    assert groups["['embed']['tokens']"] == "embedding" and groups["['head']['kernel']"] == "head"
    assert groups["['head']['bias']"] == groups["['layers']['attention']['qkv_bias']"] == "vector"
    factors = {"embedding": 0.5, "head": 3.0, "vector": 0.0, "matrix": 1.0}
    cfg = OptimizerConfig(name=name, newton_schulz_steps=1)
    plain = update(cfg, specs)
    scaled = update(
        dataclasses.replace(cfg, embedding_factor=0.5, head_factor=3.0, vector_factor=0.0),
        specs,
    )
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(scaled), jax.tree.leaves(plain), strict=True):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, factors[groups[name]] * b, rtol=1e-6, err_msg=name)


def spec_leaves(specs):
    return jax.tree_util.tree_leaves_with_path(specs, is_leaf=params.is_spec)


def test_blocks_that_begin_as_the_identity():
    """`model.zero_init_outputs`: the outputs of both blocks are drawn as zeros, and nothing else is drawn otherwise."""
    plain, zeroed = (
        params.initialize(model_specs(run_config("tutorial", zero_init_outputs=on).model), jax.random.key(0))
        for on in (False, True)
    )
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(zeroed), jax.tree.leaves(plain), strict=True):
        name = jax.tree_util.keystr(path)
        if name.endswith(("'out']", "'down']")):
            assert not np.any(a) and np.any(b), name
        else:
            np.testing.assert_array_equal(a, b, err_msg=name)
