"""The mesh and its rules: what doesn't fit is refused with the numbers, and no mesh changes the losses."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import lm
from lm.config import InputError, ParallelConfig
from lm.nn import params
from lm.nn.language_model import model_specs
from lm.parallel import RULES, check_batch, make_mesh, parameter_shardings, sharding
from lm.validation import validate

from .training.ten_steps import losses, run_config


def test_data_takes_what_the_others_leave():
    assert dict(make_mesh(ParallelConfig()).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(ParallelConfig(fsdp=2, tensor=2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert make_mesh(ParallelConfig(data=2)).size == 2


@pytest.mark.parametrize("cfg", [ParallelConfig(fsdp=3), ParallelConfig(data=16), ParallelConfig(data=4, tensor=4)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(cfg):
    with pytest.raises(InputError, match="8 device"):
        make_mesh(cfg)


def test_a_dimension_that_its_axis_does_not_divide_is_refused():
    """JAX would drop the constraint without a word."""
    mesh = make_mesh(ParallelConfig(tensor=8))
    with pytest.raises(InputError, match="'mlp' of size 12.*8 devices on mesh axis 'tensor'"):
        sharding(mesh, (16, 12), ("embed", "mlp"))
    with pytest.raises(KeyError, match="mpl"):
        sharding(mesh, (16, 8), ("embed", "mpl"))
    with pytest.raises(AssertionError, match="twice"):
        sharding(mesh, (16, 8), ("mlp", "vocab"))


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    mesh = make_mesh(ParallelConfig(fsdp=2))
    check_batch(16, 2, mesh)
    with pytest.raises(InputError, match="batch_size 250 is not a multiple of the 8 devices.*use 248 or 256"):
        check_batch(250, 1, mesh)
    with pytest.raises(InputError, match="batch_size 24 .* x 2 micro-batches: use 16 or 32"):
        check_batch(24, 2, mesh)
    with pytest.raises(InputError, match="use 8$"):
        check_batch(3, 1, mesh)


def test_every_axis_of_every_parameter_has_a_rule(model):
    specs = model_specs(model)
    names = {name for spec in jax.tree.leaves(specs, is_leaf=params.is_spec) for name in spec.axes}
    assert names <= set(RULES)
    tree = parameter_shardings(make_mesh(ParallelConfig()), specs)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("name", "parallel", "training"),
    [("gpt2_124m", {"fsdp": 8}, {"gradient_accumulation": 5}), ("llama_1b", {"fsdp": 8}, {}), ("tiny", {}, {})],
)
def test_the_documented_commands_fit_eight_devices(name, parallel, training):
    """As README and preset docstrings have them; nothing is allocated."""
    cfg = lm.preset(name)
    training = dataclasses.replace(cfg.training, **training)
    cfg = validate(dataclasses.replace(cfg, parallel=ParallelConfig(**parallel), training=training))
    mesh = make_mesh(cfg.parallel)
    check_batch(cfg.training.batch_size, cfg.training.gradient_accumulation, mesh)
    parameter_shardings(mesh, model_specs(cfg.resolve(cfg.tokenizer.vocab_size).model))


MESHES = {
    "gpt2": [ParallelConfig(), ParallelConfig(fsdp=8), ParallelConfig(fsdp=2, tensor=2)],
    "llama": [ParallelConfig(fsdp=4), ParallelConfig(fsdp=2, tensor=2)],
}


@pytest.mark.parametrize("name", MESHES)
def test_ten_steps_on_any_mesh_equal_one_device(name, one_device):
    """float32, 1e-5 relative: the reduction over devices sums in another order. Dropout and accumulation are on."""
    cfg = run_config(name, dropout=0.1, gradient_accumulation=2, vocab_multiple=8)
    alone = losses(cfg, one_device)
    for parallel in MESHES[name]:
        other, state = losses(dataclasses.replace(cfg, parallel=parallel), make_mesh(parallel), with_state=True)
        np.testing.assert_allclose(other, alone, rtol=1e-5, err_msg=str(parallel))
        matrix = state.params["layers"]["feed_forward"]["up"]
        moment = state.opt_state[1].mu["layers"]["feed_forward"]["up"]
        parts = parallel.fsdp * parallel.tensor
        for array in (matrix, moment):
            assert array.addressable_shards[0].data.size * parts == array.size, "each device holds its part alone"
