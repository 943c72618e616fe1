"""The training step: sums divided once, dropout by row, decay and clipping where they belong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm.nn import params
from lm.nn.language_model import model_specs, unconstrained
from lm.parallel import put_rows
from lm.training.optimizer import decay_mask
from lm.training.step import batch_loss

from ..conftest import SHAPES
from .ten_steps import batch_at, compiled, losses, run_config

GOLDEN = Path(__file__).parent / "golden_losses.json"


def test_ten_steps_equal_the_golden_losses(one_device):
    """A refactor changes no number. float32 on a CPU, 1e-5 relative: other processors sum in another order.

    When a number must move, write the file anew from `golden_losses` and say why in the commit.
    """
    golden = json.loads(GOLDEN.read_text())
    assert set(golden) == set(SHAPES)
    for name, wanted in golden.items():
        np.testing.assert_allclose(golden_losses(name, one_device), wanted, rtol=1e-5, err_msg=name)


def golden_losses(name, mesh):
    return losses(run_config(name, dropout=0.1 if name == "tutorial" else 0.0), mesh)


def test_accumulation_equals_the_big_batch(one_device):
    """Over 1, 2 and 4 micro-batches, with padding in some and dropout on: one update, 1e-6 relative in the loss.

    The tutorial shape has dropout at every site. Gradients are compared through Adam's first moment: Adam divides by
    their size, so in the parameters the rounding of a gradient near 0 would show as a whole step.
    """
    batch = batch_at(0)
    padded = [int((batch.weights_BT[micro::4].sum(1) < 20).sum()) for micro in range(4)]
    assert 0 in padded and max(padded) > 0, "some micro-batches have padding and some have none"
    results = {}
    for parts in (1, 2, 4):
        step, state = compiled(run_config("tutorial", gradient_accumulation=parts, dropout=0.3), one_device)
        results[parts] = step(state, put_rows(one_device, batch), np.float32(0))
    for parts in (2, 4):
        (state, sums), (wanted, wanted_sums) = results[parts], results[1]
        np.testing.assert_allclose(sums.nats, wanted_sums.nats, rtol=1e-6)
        np.testing.assert_allclose(sums.grad_norm, wanted_sums.grad_norm, rtol=1e-5)
        assert sums.tokens == wanted_sums.tokens == batch.weights_BT.sum()
        moments, wanted_moments = state.opt_state[1].mu, wanted.opt_state[1].mu
        for a, b in zip(jax.tree.leaves(moments), jax.tree.leaves(wanted_moments), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * float(jnp.abs(b).max()) + 1e-9)


def test_mean_of_micro_batch_means_is_another_gradient(one_device):
    """The test above can fail: dividing each micro-batch by its own tokens moves the gradient by far more than 1e-4."""
    cfg = run_config("gpt2").model
    tree = params.initialize(model_specs(cfg), jax.random.key(0))
    batch = batch_at(0)

    def nats(tree, rows):
        part = jax.tree.map(lambda x: jnp.asarray(x[rows]), batch)
        _, nats = batch_loss(tree, part, None, cfg=cfg, z_loss=None, constrain=unconstrained)
        return nats, part.weights_BT.sum()

    def ratio_of_sums(tree):
        totals = [nats(tree, slice(micro, None, 4)) for micro in range(4)]
        return sum(n for n, _ in totals) / sum(t for _, t in totals)

    def mean_of_means(tree):
        return sum(n / t for n, t in (nats(tree, slice(micro, None, 4)) for micro in range(4))) / 4

    right, wrong = (jax.jit(jax.grad(f))(tree)["layers"]["attention"]["qkv"] for f in (ratio_of_sums, mean_of_means))
    assert float(jnp.abs(right - wrong).max() / jnp.abs(right).max()) > 1e-2


def test_padding_rows_change_nothing(one_device):
    """Without dropout: a batch, and the same batch with its padding filled by other ids."""
    batch = batch_at(0)
    step, state = compiled(run_config("llama"), one_device)
    filled = batch._replace(tokens_BT=np.where(batch.segments_BT == 0, 7, batch.tokens_BT))
    assert not np.array_equal(filled.tokens_BT, batch.tokens_BT)
    one, other = (step(state, put_rows(one_device, b), np.float32(0)) for b in (batch, filled))
    np.testing.assert_array_equal(one[1].nats, other[1].nats)
    np.testing.assert_array_equal(one[1].grad_norm, other[1].grad_norm)


def test_dropout_differs_by_step_and_seed(one_device):
    step, state = compiled(run_config("gpt2", dropout=0.3), one_device)
    batch = put_rows(one_device, batch_at(0))
    nats = float(step(state, batch, np.float32(0))[1].nats)
    assert nats == float(step(state, batch, np.float32(0))[1].nats)
    assert nats != float(step(state._replace(step=state.step + 1), batch, np.float32(0))[1].nats)
    cfg = run_config("gpt2", dropout=0.3)
    seeded, _ = compiled(dataclasses.replace(cfg, training=dataclasses.replace(cfg.training, seed=4)), one_device)
    assert nats != float(seeded(state, batch, np.float32(0))[1].nats)


def test_decay_covers_every_parameter(model):
    """Matrices and tables decay, norms and biases don't; the two together are all."""
    specs = model_specs(model)
    mask = decay_mask(specs)
    assert jax.tree.structure(mask) == jax.tree.structure(params.map_specs(lambda _: 0, specs))
    for path, decays in jax.tree_util.tree_leaves_with_path(mask):
        name = jax.tree_util.keystr(path)
        assert decays == (not any(word in name for word in ("bias", "scale"))), name


def test_decay_shrinks_matrices_alone(one_device):
    """With no tokens to learn from, the gradient is 0 and only decay moves a parameter: by rate · decay · itself."""
    cfg = run_config("gpt2")
    step, state = compiled(cfg, one_device)
    silent = batch_at(0)._replace(weights_BT=np.zeros_like(batch_at(0).weights_BT))
    after, sums = step(state, put_rows(one_device, silent), np.float32(0))
    shrink = 1 - float(sums.learning_rate) * cfg.optimizer.weight_decay
    mask = decay_mask(model_specs(cfg.model))
    for path, decays in jax.tree_util.tree_leaves_with_path(mask):
        before, now = (leaf_at(tree, path) for tree in (state.params, after.params))
        np.testing.assert_allclose(
            now, before * (shrink if decays else 1), rtol=1e-6, err_msg=jax.tree_util.keystr(path)
        )


def leaf_at(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


def test_clipping_scales_the_gradient_to_the_norm(one_device):
    cfg = run_config("gpt2")
    batch = put_rows(one_device, batch_at(0))
    results = {}
    for clip in (None, 0.01):
        optimizer = dataclasses.replace(cfg.optimizer, clip_norm=clip)
        step, state = compiled(dataclasses.replace(cfg, optimizer=optimizer), one_device)
        results[clip] = step(state, batch, np.float32(0))
    norm = float(results[None][1].grad_norm)
    assert norm == float(results[0.01][1].grad_norm) > 0.01, "the norm before clipping is reported"
    first, clipped = (optax.tree.norm(results[clip][0].opt_state[1].mu) for clip in (None, 0.01))
    np.testing.assert_allclose(clipped / first, 0.01 / norm, rtol=1e-5)
