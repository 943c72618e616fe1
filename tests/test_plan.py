"""The plan of a run, beside the state and the compiled step that it is a plan of."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import pytest

from lm import __main__ as commands
from lm import api
from lm.config import InputError, RunConfig
from lm.nn.language_model import model_specs
from lm.parallel import make_mesh
from lm.plan import abstract_batch, plan, resolved
from lm.training.lowering import lower_step
from lm.training.optimizer import make_optimizer
from lm.training.state import create_state

from .training.ten_steps import run_config


@pytest.fixture(autouse=True, scope="module")
def started():
    """JAX with its eight devices: a plan for others, made first, would start it with as many as it needs."""
    return jax.devices()


def with_parts(cfg: RunConfig, **sections: dict) -> RunConfig:
    changed = {name: dataclasses.replace(getattr(cfg, name), **fields) for name, fields in sections.items()}
    return dataclasses.replace(cfg, **changed)


def real_bytes(tree: object, device: jax.Device) -> int:
    """What a device holds of a tree of arrays."""
    pieces = [piece for leaf in jax.tree.leaves(tree) for piece in leaf.addressable_shards if piece.device == device]
    return sum(piece.data.nbytes for piece in pieces)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bytes_of_the_state_are_those_that_a_device_holds(optimizer):
    cfg = with_parts(
        run_config("llama"),
        model={"vocab_multiple": 8},
        parallel={"fsdp": 2, "tensor": 2},
        optimizer={"name": optimizer},
        training={"ema_decay": 0.9},
    )
    mesh = make_mesh(cfg.parallel)
    state = create_state(cfg, make_optimizer(cfg.optimizer, model_specs(cfg.model), mesh), mesh)
    found, device = plan(cfg, 8), jax.devices()[0]
    assert found.mesh == {"data": 2, "fsdp": 2, "tensor": 2}
    assert found.weights_bytes == found.ema_bytes == real_bytes(state.params, device)
    assert found.optimizer_bytes == real_bytes(state.opt_state, device)
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(state.params))


NEWER = pytest.mark.xfail(
    jax.__version_info__ >= (0, 11),
    reason="17.6 MB by the XLA of jax 0.12, 22.4 by that of 0.10: the estimate of 20.4 is 16 % more than the newer's",
)


@pytest.mark.parametrize("name, fsdp", [("tiny", 1), pytest.param("tiny", 8, marks=NEWER), ("llama_1b", 8)])
def test_bytes_of_a_step_are_those_of_the_compiled_one(name, fsdp):
    """Within 15 %, for a shape of a billion parameters too: nothing is allocated."""
    cfg = with_parts(resolved(api.preset(name), api.load), parallel={"fsdp": fsdp})
    mesh = make_mesh(cfg.parallel, jax.devices()[:fsdp])
    optimizer = make_optimizer(cfg.optimizer, model_specs(cfg.model), mesh)
    memory = lower_step(cfg, optimizer, mesh, abstract_batch(cfg, mesh)).compile().memory_analysis()
    xla = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    xla += memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert plan(cfg, fsdp).total_bytes == pytest.approx(xla, rel=0.15)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_bytes_of_an_encoder_decoders_step_are_those_of_the_compiled_one(name, one_device):
    """Within 15 %, wide enough for activations and weights to count."""
    wider = {"d_model": 128, "d_ff": 512, "scan_layers": True, "vocab_multiple": 64}
    cfg = with_parts(run_config(name), model=wider, data={"context": 96, "source_context": 64})
    cfg = with_parts(cfg, model={"max_positions": 96})
    optimizer = make_optimizer(cfg.optimizer, model_specs(cfg.model), one_device)
    memory = lower_step(cfg, optimizer, one_device, abstract_batch(cfg, one_device)).compile().memory_analysis()
    xla = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    xla += memory.output_size_in_bytes - memory.alias_size_in_bytes
    found = plan(cfg, 1)
    assert found.total_bytes == pytest.approx(xla, rel=0.15)
    assert (found.encoder_layers, found.source_context) == (cfg.model.source_layers, 64)


def temporary_bytes(cfg: RunConfig, devices: int, platform: str = "gpu") -> int:
    found = plan(cfg, devices, platform)
    return found.activations_bytes + found.weight_copies_bytes + found.gradients_bytes


def test_temporaries_go_with_the_rows_and_shrink_by_remat_and_tensor():
    cfg = with_parts(run_config("llama"), model={"vocab_multiple": 8})
    few, many = (temporary_bytes(with_parts(cfg, training={"batch_size": rows}), 1) for rows in (16, 64))
    assert 3 * few < many < 4 * few
    assert temporary_bytes(with_parts(cfg, parallel={"tensor": 2}), 2) < 0.8 * few
    scanned = with_parts(cfg, model={"num_layers": 16, "scan_layers": True})
    assert temporary_bytes(with_parts(scanned, model={"remat": True}), 1) < 0.5 * temporary_bytes(scanned, 1)


def test_scanned_layers_are_gathered_one_at_a_time():
    """With fsdp, a device holds its part of the state and one whole layer: twice the layers add parts alone."""
    scanned = {"scan_layers": True, "remat": True, "d_ff": 4096}
    cfg = with_parts(run_config("llama"), model=scanned, parallel={"fsdp": 8})
    shallow, deep = (plan(with_parts(cfg, model={"num_layers": layers}), 8, "gpu") for layers in (4, 8))
    layer = 4 * shallow.layer_parameters
    assert deep.weight_copies_bytes - shallow.weight_copies_bytes < layer / 8
    assert deep.weights_bytes - shallow.weights_bytes == pytest.approx(4 * layer / 8, rel=0.05)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_an_accelerator_is_planned_without_being_there(platform):
    cfg = with_parts(run_config("llama"), model={"compute_dtype": "bfloat16"}, data={"context": 256})
    found = plan(cfg, 1, platform)
    assert found.activations_bytes > 0 == found.cpu_copies_bytes


def test_a_billion_parameters_are_planned_without_being_there():
    found = plan(resolved(with_parts(api.preset("llama_1b"), parallel={"fsdp": 8}), api.load), 8)
    assert found.parameters == 1_235_814_400  # Llama 3.2 1B's
    assert found.weights_bytes == pytest.approx(4 * found.parameters / 8, rel=0.001)
    assert found.optimizer_bytes == pytest.approx(2 * found.weights_bytes, rel=0.001)
    assert found.flops_per_token == pytest.approx(6 * 1_235_746_816 + 12 * 16 * 2048 * 2048)
    rows = 256 // 8 // 4
    assert found.activations_bytes > 16 * rows * 2048 * 2048 * 2  # remat: the residual stream before each layer


def test_the_command_prints_and_writes(tmp_path, capsys):
    commands.plan(["tiny", "--model.num-layers", "2", "--devices", "2", "--json", str(tmp_path / "plan.json")])
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["layers"] == 2 and found["mesh"]["data"] == 2 and found["total_bytes"] > 2 * found["weights_bytes"]
    assert f"{found['parameters']:,} parameters" in said and "arXiv:2204.02311" in said
    assert f"{found['total_bytes'] / 1e6:,.1f} MB" in said and math.isfinite(found["flops_per_token"])


@pytest.mark.parametrize(
    "argv, said",
    [
        (["tinny"], "did you mean 'tiny'"),
        (["tiny", "--model.num-heads", "3"], "model.num_heads 3 does not divide"),
        (["tiny", "--devices", "8", "--parallel.fsdp", "3"], "does not fit 8 device"),
        (["tiny", "--devices", "3"], "use 6 or 9"),
        (["tiny", "--devices", "-3"], "--devices is -3: use 1 or more"),
        (["tiny", "--parallel.tensor", "8"], "model.num_heads"),
        (["tiny", "--tokenizer.kind", "file", "--tokenizer.path", "/nowhere"], "/nowhere"),
        (["tiny", "--json", "/nowhere/plan.json"], "--json"),
        (["tiny", "--mesh", "data=8,fsd=2"], "did you mean 'fsdp'"),
        (["tiny", "--mesh", "fsdp=0"], "write AXIS=SIZE"),
        (["tiny", "--mesh", "fsdp"], "write AXIS=SIZE"),
        (["tiny", "--mesh", "fsdp=2,fsdp=2"], "twice"),
        (["tiny", "--mesh", "fsdp=2", "--devices", "4"], "leave --devices out"),
        (["tiny", "--mesh", "fsdp=3", "--device", "h100"], "use 6 or 9"),
        (["tiny", "--mesh", "tensor=8", "--device", "h100"], "model.num_heads"),
        (["tiny", "--device", "h10"], "did you mean 'h100'"),
        (["tiny", "--devices-per-host", "4"], "with --device"),
    ],
)
def test_what_does_not_fit_is_refused(argv, said):
    with pytest.raises(InputError, match=said):
        commands.plan(argv)
