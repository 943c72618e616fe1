"""The mesh and its rules: what doesn't fit is refused with the numbers."""

from __future__ import annotations

import dataclasses

import jax
import pytest
from jax.sharding import PartitionSpec

import lm
from lm.config import InputError, ParallelConfig, RunConfig
from lm.nn import params
from lm.nn.language_model import model_specs
from lm.parallel import RULES, _grid, _in_order, check_batch, make_mesh, parameter_shardings, rules_of, sharding
from lm.validation import validate


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
    with pytest.raises(InputError, match="mesh axis 'tensor' would split .* twice.*'mlp'=tensor and 'vocab'=tensor"):
        sharding(mesh, (16, 8), ("mlp", "vocab"))


def test_rules_of_a_config_replace_the_built_in_ones():
    cfg = RunConfig(parallel=ParallelConfig(fsdp=2, tensor=2, rules=("embed=data+fsdp", "vocab=", "positions=tensor")))
    assert RunConfig.from_json(cfg.to_json()) == validate(cfg) == cfg
    rules = rules_of(cfg.parallel)
    changed = {"embed": ("data", "fsdp"), "vocab": (), "positions": ("tensor",)}
    assert rules == {**RULES, **changed} and rules_of(ParallelConfig()) == RULES
    mesh = make_mesh(cfg.parallel)
    specs = model_specs(cfg.resolve(256).model)
    assert parameter_shardings(mesh, specs, rules)["embed"]["tokens"].spec == PartitionSpec(None, ("data", "fsdp"))
    assert parameter_shardings(mesh, specs)["embed"]["tokens"].spec == PartitionSpec("tensor", "fsdp")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("embed", "has 'embed': write NAME=AXIS"),
        ("embd=fsdp", "names 'embd', which is no axis .*did you mean 'embed'"),
        ("mlp=tensr", "no axis 'tensr'.*did you mean 'tensor'.*data, fsdp, tensor"),
        ("batch=data", "changes 'batch', but every device"),
        ("layers=fsdp", "changes 'layers', but"),
        ("mlp=fsdp", r"'fsdp' would split an array of axes \('batch', 'length', 'mlp'\) twice.*'batch'=data\+fsdp"),
        ("embed=fsdp+fsdp", "names 'fsdp' twice"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(rule, message):
    with pytest.raises(InputError, match=message):
        rules_of(ParallelConfig(rules=(rule,)))
    with pytest.raises(InputError, match="'head' twice: keep one"):
        rules_of(ParallelConfig(rules=("head=", "head=")))


def test_a_parameter_that_rules_would_split_twice_is_refused(model):
    mesh = make_mesh(ParallelConfig(tensor=2))
    with pytest.raises(InputError, match="'tensor' would split"):
        parameter_shardings(mesh, model_specs(model), rules_of(ParallelConfig(rules=("embed=tensor",))))


@dataclasses.dataclass
class Device:
    """What the order of devices is read from."""

    slice_index: int
    process_index: int
    id: int
    platform: str = "gpu"


def test_the_fast_axis_stays_within_a_process():
    """Four processes of two devices each, ids given out across them and listed in no order."""
    devices = [Device(0, process, 4 * local + process) for local in (1, 0) for process in (2, 0, 3, 1)]
    grid = _grid(_in_order(devices), (2, 2, 2))
    assert all(one.process_index == other.process_index for one, other in grid.reshape(-1, 2))


def test_no_process_is_left_without_a_device():
    devices = [Device(0, process, process) for process in range(4)]
    with pytest.raises(InputError, match="takes 2 of 4 devices and leaves none to 2 processes, 2 the first"):
        make_mesh(ParallelConfig(data=2), devices)


def test_processes_of_a_slice_stay_together():
    devices = [Device(process % 2, process, 2 * process + local) for process in range(4) for local in range(2)]
    assert [device.process_index for device in _in_order(devices)] == [0, 0, 2, 2, 1, 1, 3, 3]


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
