"""Muon: each matrix by itself, whatever array holds it, and whole layers spread over the devices."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import OptimizerConfig, ParallelConfig
from lm.nn import params
from lm.nn.language_model import model_specs
from lm.nn.matmul import numerics
from lm.parallel import make_mesh, parameter_shardings, put_rows
from lm.training import muon
from lm.training.lowering import lower_step
from lm.training.muon import RMS, newton_schulz, polynomials, scale_by_muon
from lm.training.optimizer import make_optimizer
from lm.training.state import create_state

from .ten_steps import batch_at, losses, run_config, ten_losses

MUON = OptimizerConfig(
    name="muon", learning_rate=5e-3, warmup_steps=2, newton_schulz_dtype="float32", clip_norm=None, weight_decay=0.0
)


FIVE = polynomials("jordan", 5)


def reference(g: np.ndarray, steps=FIVE) -> np.ndarray:
    """Newton-Schulz of one matrix in float64, through its singular values: s <- a s + b s³ + c s⁵ by each step's."""
    u, s, v = np.linalg.svd(g.astype(np.float64), full_matrices=False)
    s = s / (np.sqrt((s**2).sum()) + 1e-7)
    for a, b, c in steps:
        s = a * s + b * s**3 + c * s**5
    return RMS * np.sqrt(max(g.shape)) * (u * s) @ v


def gradients(model):
    specs = model_specs(model)
    flat, tree = jax.tree.flatten(specs, is_leaf=params.is_spec)
    draw = np.random.default_rng(0)
    return specs, jax.tree.unflatten(tree, [draw.normal(size=s.shape).astype(np.float32) for s in flat])


def update_of(model, grads, specs, mesh=None, *, cfg=MUON):
    """Muon's first update of the layers' matrices; with Nesterov momentum it is that of the gradient itself."""
    optimizer = make_optimizer(cfg, specs, mesh)
    return jax.jit(lambda g: optimizer.update(g, optimizer.init(g), g)[0])(grads)


def test_every_matrix_of_every_layer_is_orthogonalised_by_itself():
    """Grouped heads and a gated feed-forward block: q, k, v apart, `out` over heads and head width together."""
    model = run_config("llama").model
    specs, grads = gradients(model)
    found = update_of(model, grads, specs)["layers"]
    layers, D, H, K = grads["layers"], model.d_model, model.head_width, model.kv_heads
    for layer in range(model.num_layers):
        qkv, got = layers["attention"]["qkv"][layer], found["attention"]["qkv"][layer]
        queries = (model.num_heads // K) * H
        for piece in (slice(0, queries), slice(queries, queries + H), slice(queries + H, None)):
            wanted = reference(qkv[..., piece].reshape(D, -1))
            np.testing.assert_allclose(got[..., piece].reshape(D, -1), wanted, atol=1e-4 * np.abs(wanted).max())
        for block, name, rows in (("attention", "out", -1), ("feed_forward", "up", D), ("feed_forward", "down", 48)):
            wanted = reference(layers[block][name][layer].reshape(rows, layers[block][name].shape[-1]))
            got = found[block][name][layer].reshape(wanted.shape)
            np.testing.assert_allclose(got, wanted, atol=1e-4 * np.abs(wanted).max(), err_msg=name)


def test_cross_attention_and_the_encoders_layers_are_matrices_too():
    """Keys and values apart, and the encoder's layers as the decoder's; its own table is AdamW's."""
    model = run_config("bart").model
    specs, grads = gradients(model)
    found = update_of(model, grads, specs)
    D, H = model.d_model, model.head_width
    cross, got = grads["layers"]["cross_attention"], found["layers"]["cross_attention"]
    for layer in range(model.num_layers):
        for wanted, ours in (
            (cross["q"][layer].reshape(D, -1), got["q"][layer].reshape(D, -1)),
            (cross["kv"][layer][..., :H].reshape(D, -1), got["kv"][layer][..., :H].reshape(D, -1)),
            (cross["kv"][layer][..., H:].reshape(D, -1), got["kv"][layer][..., H:].reshape(D, -1)),
            (cross["out"][layer].reshape(-1, D), got["out"][layer].reshape(-1, D)),
        ):
            np.testing.assert_allclose(ours, reference(wanted), atol=1e-4)
    up, ours = (tree["encoder"]["layers"]["feed_forward"]["up"] for tree in (grads, found))
    for layer in range(model.source_layers):
        np.testing.assert_allclose(ours[layer], reference(up[layer]), atol=1e-4)
    table = found["encoder"]["embed"]["tokens"]
    np.testing.assert_allclose(np.abs(table), 1, rtol=1e-3)  # Adam's first step


def test_by_head_each_head_of_query_key_and_value_is_a_matrix():
    """Two heads of queries lie side by side in a group; what reads all heads stays one matrix."""
    model = run_config("llama").model
    specs, grads = gradients(model)
    found = update_of(model, grads, specs, cfg=dataclasses.replace(MUON, muon_by_head=True))["layers"]
    together = update_of(model, grads, specs)["layers"]
    H, heads = model.head_width, model.num_heads // model.kv_heads + 2
    assert heads > 3
    for layer in range(model.num_layers):
        qkv, got = (tree["attention"]["qkv"][layer] for tree in (grads["layers"], found))
        for group in range(model.kv_heads):
            for head in range(heads):
                place = (slice(None), group, slice(head * H, (head + 1) * H))
                wanted = reference(qkv[place])
                np.testing.assert_allclose(got[place], wanted, atol=1e-4 * np.abs(wanted).max())
    for block, name in (("attention", "out"), ("feed_forward", "up")):
        np.testing.assert_allclose(found[block][name], together[block][name], atol=1e-5)
    assert not np.allclose(found["attention"]["qkv"], together["attention"]["qkv"], atol=0.01)


def test_by_head_cross_attention_has_heads_too():
    model = run_config("bart").model
    specs, grads = gradients(model)
    found = update_of(model, grads, specs, cfg=dataclasses.replace(MUON, muon_by_head=True))
    given, got = (tree["layers"]["cross_attention"] for tree in (grads, found))
    H = model.head_width
    for head in range(model.num_heads):
        np.testing.assert_allclose(got["q"][0][:, head], reference(given["q"][0][:, head]), atol=1e-4)
    for head in range(model.kv_heads):
        for piece in (slice(0, H), slice(H, None)):
            wanted = reference(given["kv"][0][:, head, piece])
            np.testing.assert_allclose(got["kv"][0][:, head, piece], wanted, atol=1e-4)


@pytest.mark.parametrize("steps", [FIVE, polynomials("polar_express", 5)], ids=["jordan", "polar_express"])
def test_wide_matrices_by_their_gram_are_as_exact(steps, monkeypatch):
    """Singular values over five orders of magnitude: the Gram matrix of the smallest is below its rounding."""
    draw = np.random.default_rng(0)
    u, v = (np.linalg.qr(draw.normal(size=(rows, 32)))[0] for rows in (32, 80))
    x = (u * np.logspace(0, -5, 32)) @ v.T
    wanted = reference(x, steps) / (RMS * np.sqrt(80))

    def error() -> float:
        found = newton_schulz(jnp.asarray(x[None], jnp.float32), steps=steps, numerics=numerics("float32"))
        return np.abs(found[0] - wanted).max() / np.abs(wanted).max()

    assert error() < 5e-5
    monkeypatch.setattr(muon, "LEG", 9)
    assert error() > 2e-4, "the check can fail"


def test_singular_values_come_near_one_and_zero_stays_zero():
    x_ZRC = jax.random.normal(jax.random.key(0), (3, 16, 40)).at[2].set(0.0)
    found = newton_schulz(x_ZRC, steps=FIVE, numerics=numerics("float32"))
    values = np.linalg.svd(found[:2], compute_uv=False)
    assert values.min() > 0.6 and values.max() < 1.3
    for steps, nearness in ((3, 0.88), (4, 0.58), (5, 0.16), (9, 1e-4)):
        how = polynomials("polar_express", steps)
        assert len(how) == steps
        more = newton_schulz(x_ZRC, steps=how, numerics=numerics("float32"))[:2]
        assert np.abs(np.linalg.svd(more, compute_uv=False) - 1).max() < nearness
    assert not found[2].any()
    rounded = newton_schulz(x_ZRC, steps=FIVE, numerics=numerics("bfloat16"))
    assert 1e-4 < float(jnp.abs(rounded - found).max()) < 0.1, "bfloat16 operands"


def test_the_config_says_which_polynomials():
    model = run_config("bare").model
    specs, grads = gradients(model)
    cfg = dataclasses.replace(MUON, newton_schulz="polar_express", newton_schulz_steps=3)
    optimizer = make_optimizer(cfg, specs)
    found = optimizer.update(grads, optimizer.init(grads), grads)[0]["layers"]["feed_forward"]["up"][0]
    wanted = reference(grads["layers"]["feed_forward"]["up"][0], polynomials("polar_express", 3))
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
    assert not np.allclose(wanted, reference(grads["layers"]["feed_forward"]["up"][0]), atol=0.1)


def test_embeddings_head_and_vectors_are_adamws():
    model = run_config("tutorial").model
    specs, grads = gradients(model)
    adamw = make_optimizer(dataclasses.replace(MUON, name="adamw"), specs)
    wanted = adamw.update(grads, adamw.init(grads), grads)[0]
    found = update_of(model, grads, specs)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        name, same = jax.tree_util.keystr(path), leaf
        for key in path:
            same = same if same is not leaf else wanted
            same = same[key.key]
        matrix = any(word in name for word in ("'qkv'", "'out'", "'up'", "'down'"))
        assert np.allclose(leaf, same, rtol=1e-5) != matrix, name


def test_momentum_is_nesterovs():
    specs = {"w": params.ParamSpec((1, 8, 8), ("layers", "embed", "mlp"), params.zeros, inputs=1)}
    rule = scale_by_muon(specs, momentum=0.5, steps=FIVE, numerics=numerics("float32"), mesh=None)
    first, second = np.random.default_rng(0).normal(size=(2, 1, 8, 8)).astype(np.float32)
    _, state = rule.update({"w": first}, rule.init({"w": first}))
    found, _ = rule.update({"w": second}, state)
    wanted = reference((second + 0.5 * (second + 0.5 * first))[0])
    np.testing.assert_allclose(found["w"][0], wanted, atol=1e-4 * np.abs(wanted).max())


MESHES = [ParallelConfig(fsdp=8), ParallelConfig(data=2, fsdp=2, tensor=2), ParallelConfig(data=8)]


@pytest.mark.parametrize("parallel", MESHES, ids=lambda p: f"{p.data}x{p.fsdp}x{p.tensor}")
def test_on_a_mesh_whole_layers_are_spread_and_no_stack_is_gathered(parallel):
    """Three layers, which no number of devices here divides: each is computed on one device, to the same numbers."""
    model = dataclasses.replace(run_config("gpt2", vocab_multiple=8).model, num_layers=3)
    specs, grads = gradients(model)
    wanted = update_of(model, grads, specs)
    mesh = make_mesh(parallel)
    optimizer = make_optimizer(MUON, specs, mesh)
    shardings = parameter_shardings(mesh, specs)
    placed = jax.device_put(grads, shardings)

    def compiled_update(optimizer):
        update = jax.jit(lambda g: optimizer.update(g, optimizer.init(g), g)[0], out_shardings=shardings)
        return update.lower(placed).compile()

    update = compiled_update(optimizer)
    for a, b in zip(jax.tree.leaves(update(placed)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
    products = re.findall(r"= f32\[(\d+),\d+,\d+\]\S* (?:dot|custom-call)\(", update.as_text())
    assert products and max(map(int, products)) <= 8, "of q, k, v and out a layer each, or two"
    if parallel.data == 8:
        return  # parameters lie whole on every device: what is gathered are the updates, once each
    assert "all-to-all" in update.as_text()
    assert max(gathered(update), default=0) < model.num_layers
    if parallel.fsdp == 8:
        assert max(gathered(compiled_update(make_optimizer(MUON, specs)))) >= model.num_layers, "the check can fail"


def gathered(compiled) -> list[int]:
    """The first dimension of all matrices and stacks that are all-gathered: of a stack the layers."""
    found = re.findall(r"= \w+\[(\d+),\d+,[\d,]+\]\S* all-gather(?:-start)?\(", compiled.as_text())
    return [int(layers) for layers in found]


def test_ten_steps_on_a_mesh_equal_one_device_and_gather_no_stack(one_device):
    """float32, 1e-4 relative: Newton-Schulz multiplies the rounding of the reduction over devices."""
    cfg = dataclasses.replace(run_config("gpt2", vocab_multiple=8), optimizer=MUON)
    parallel = ParallelConfig(fsdp=8)
    mesh = make_mesh(parallel)
    on_mesh = dataclasses.replace(cfg, parallel=parallel)
    optimizer = make_optimizer(MUON, model_specs(cfg.model), mesh)
    state = create_state(on_mesh, optimizer, mesh)
    for leaf in jax.tree.leaves(state.opt_state[1].inner_states["matrices"]):
        assert leaf.addressable_shards[0].data.size * 8 == leaf.size, "each device holds its part of the momentum"
    step = lower_step(on_mesh, optimizer, mesh, put_rows(mesh, batch_at(0))).compile()
    assert cfg.model.num_layers not in gathered(step)
    np.testing.assert_allclose(ten_losses(step, state, mesh)[0], losses(cfg, one_device), rtol=1e-4)
