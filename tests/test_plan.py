"""The plan of a run, beside the state and the compiled step that it is a plan of."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import pytest

from lm import __main__ as commands
from lm import api
from lm.config import InputError, ParallelConfig, RunConfig
from lm.data.pipeline import Batch
from lm.nn.language_model import model_specs
from lm.parallel import make_mesh, put_rows
from lm.plan import kept_bytes, plan, resolved
from lm.training.lowering import lower_step
from lm.training.optimizer import make_optimizer
from lm.training.state import create_state

from .training.ten_steps import batch_at, run_config


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
    assert found.weights_bytes == found.ema_bytes == found.gradients_bytes == real_bytes(state.params, device)
    assert found.optimizer_bytes == real_bytes(state.opt_state, device)
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_bytes_of_a_step_are_about_those_of_the_compiled_one(name):
    cfg = with_parts(run_config(name), training={"batch_size": 16})
    mesh = make_mesh(ParallelConfig(), jax.devices()[:1])
    optimizer = make_optimizer(cfg.optimizer, model_specs(cfg.model), mesh)
    step = lower_step(cfg, optimizer, mesh, put_rows(mesh, Batch(*batch_at(0)))).compile()
    found = plan(cfg, 1)
    planned = found.gradients_bytes + found.activations_bytes + found.weight_copies_bytes
    assert step.memory_analysis().temp_size_in_bytes == pytest.approx(planned, rel=0.3)


def test_activations_go_with_the_rows_and_shrink_by_remat_and_tensor():
    cfg = run_config("llama")
    whole, _ = kept_bytes(cfg, 16, 1)
    assert kept_bytes(cfg, 32, 1)[0] == pytest.approx(2 * whole, rel=0.01)
    assert kept_bytes(cfg, 16, 2)[0] < 0.8 * whole
    assert kept_bytes(with_parts(cfg, model={"remat": True}), 16, 1)[0] < 0.3 * whole
    assert plan(with_parts(cfg, model={"remat": True}), 1).activations_bytes > 0.5 * whole  # of two layers, one whole


@pytest.mark.parametrize("kernel", ["cudnn", "splash"])
def test_a_kernel_that_cannot_run_here_is_planned(kernel):
    cfg = with_parts(run_config("llama"), model={"attention": kernel, "compute_dtype": "bfloat16"})
    assert plan(cfg, 1).activations_bytes > 0
    assert 0 < kept_bytes(cfg, 16, 2)[0] < 2 * kept_bytes(with_parts(cfg, model={"attention": "blockwise"}), 16, 2)[0]


def test_a_billion_parameters_are_planned_without_being_there():
    found = plan(resolved(with_parts(api.preset("llama_1b"), parallel={"fsdp": 8}), api.load), 8)
    assert found.parameters == 1_235_814_400  # Llama 3.2 1B's
    assert found.weights_bytes == pytest.approx(4 * found.parameters / 8, rel=0.001)
    assert found.optimizer_bytes == pytest.approx(2 * found.weights_bytes, rel=0.001)
    assert found.flops_per_token == pytest.approx(6 * 1_235_746_816 + 12 * 16 * 2048 * 2048)
    rows = 256 // 8 // 4
    assert found.activations_bytes > 16 * rows * 2048 * 2048 * 4  # remat: the residual stream before each layer


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
        (["tiny", "--parallel.tensor", "8"], "model.num_heads"),
        (["tiny", "--tokenizer.kind", "file", "--tokenizer.path", "/nowhere"], "/nowhere"),
        (["tiny", "--json", "/nowhere/plan.json"], "--json"),
    ],
)
def test_what_does_not_fit_is_refused(argv, said):
    with pytest.raises(InputError, match=said):
        commands.plan(argv)
