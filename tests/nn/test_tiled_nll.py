"""A large head by tiles of its matrix: the losses and gradients of the form that holds its logits."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.nn import chunked_nll, tiled_nll
from lm.nn.head import entries, with_entries
from lm.nn.language_model import unconstrained
from lm.nn.matmul import numerics
from lm.nn.tiled_nll import tile_count, tiled_loss

from .test_chunked_nll import assert_same, example, loss_and_gradients


@pytest.fixture
def set_tiles(monkeypatch):
    """Sets names of `tiled_nll`; what was compiled with other values is forgotten."""

    def values(**names):
        for name, value in names.items():
            monkeypatch.setattr(tiled_nll, name, value)
        loss_and_gradients.clear_cache()

    yield values
    loss_and_gradients.clear_cache()


def eight(*_):
    return 8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("z_loss", [None, 0.1])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_tiles_give_the_same(tied, softcap, z_loss, chunks, dtype, set_tiles):
    """With three products for a tile and rows of padding; in float32 too, which shows that nothing else is different.

    In bfloat16 exponentials are rounded instead of gradients of logits: two roundings of half a unit in the last place.
    """
    arguments = example(2, 96, tied=tied, bias=False, rows=64, width=16)
    arguments = [jax.tree.map(in_bfloat16, each) for each in arguments[:2]] + [*arguments[2:]]
    options = {"softcap": softcap, "chunk": 8, "z_loss": z_loss, "dtype": dtype}
    held = loss_and_gradients(*arguments, **options)
    set_tiles(tile_count=eight, TILE_POSITIONS=192 // chunks)
    text = loss_and_gradients.lower(*arguments, **options).as_text()
    assert text.count("stablehlo.while") == 3, "the chunks, their exponentials, the gradient of the matrix"
    assert text.count("stablehlo.dot_general") == 3, "nothing is computed again"
    assert re.search(rf"dot_general.*tensor<{192 // chunks}x8xf32>", text), "not the twelve chunks of 8 positions"
    tiled = loss_and_gradients(*arguments, **options)
    assert_same(tiled, held, loss=1e-5, gradient=1e-5 if dtype == "float32" else 8e-3)
    if dtype == "bfloat16":
        exact = loss_and_gradients(*arguments, **(options | {"dtype": "float32"}))
        far, near = (distance(each[1], exact[1]) for each in (tiled, held))
        assert far < 1.1 * near, "as near to float32 as the form that holds its logits"


def in_bfloat16(x):
    """Numbers that the products' operands are exactly: what is left is the rounding of what is between."""
    return x.astype("bfloat16").astype("float32")


def distance(gradients, exact):
    """The largest of the relative distances in norm."""
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(exact), strict=True)
    return max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs)


def test_a_sure_prediction_keeps_its_gradient():
    """p of the target is 0.999: what is left of p - 1 is less than the rounding of p in bfloat16. 1e-3: half a unit in
    the last place of log Z, 11 in float32, is 5e-4 of it."""
    w = jnp.zeros((64, 8)).at[5].set(1.0)
    x_MD = jnp.full((4, 8), 11.0 / 8)  # the target's logit is 11, all others 0
    found = tiled_loss(
        w, x_MD, jnp.full(4, 5), jnp.ones(4), jnp.zeros(w.shape), fresh=True, tied=True, tiles=8, vocabulary=64,
        softcap=None, z_loss=None, numerics=numerics("bfloat16"),
    )  # fmt: skip
    short = 1.0 - np.exp(11.0) / (np.exp(11.0) + 63)
    assert 5e-4 < short < 2e-3
    np.testing.assert_allclose(found.dw[5], -4 * short * x_MD[0], rtol=1e-3)
    np.testing.assert_allclose(found.dx_MD, np.full((4, 8), -short), rtol=1e-3)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("step", [0.1, 1.0, 300.0])
def test_logits_far_apart(step, order):
    """Logits that grow, or shrink, by so much from id to id: no overflow, and nothing lost to an early shift; and the
    gradient is added to what is given."""
    w = step * jnp.arange(64)[::order, None] * jnp.ones((1, 8)) / 8
    x_MD, targets_M = jnp.ones((3, 8)), jnp.array([0, 40, 63])
    found = tiled_loss(
        w, x_MD, targets_M, jnp.ones(3), jnp.full(w.shape, 0.5), fresh=False, tied=True, tiles=8, vocabulary=64,
        softcap=None, z_loss=None, numerics=numerics("float32"),
    )  # fmt: skip

    def plain(w, x_MD):
        logits_MV = x_MD @ w.T
        return (jax.nn.logsumexp(logits_MV, axis=-1) - entries(logits_MV, targets_M)).sum()

    wanted, (dw, dx_MD) = jax.value_and_grad(plain, argnums=(0, 1))(w, x_MD)
    np.testing.assert_allclose(jnp.sum(found.log_z_M - found.logit_M), wanted, rtol=1e-6)
    np.testing.assert_allclose(found.dw, 0.5 + dw, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.dx_MD, dx_MD, atol=1e-6 * float(w.max()))  # a sum of rows of w, less one


@pytest.mark.parametrize(("bias", "smoothing"), [(True, None), (False, 0.1)])
def test_a_bias_and_smoothing_have_their_logits_held(bias, smoothing, set_tiles):
    arguments = example(2, 96, tied=True, bias=bias, rows=64)
    options = {"softcap": None, "chunk": 8, "dtype": "bfloat16", "label_smoothing": smoothing}
    set_tiles(tile_count=eight)
    text = loss_and_gradients.lower(*arguments, **options).as_text()
    assert text.count("stablehlo.while") == 1, "the chunks"


def test_tiles_are_of_large_matrices():
    assert tile_count(50_304 * 768, 50_304, "bfloat16") == 16
    assert tile_count(50_368 * 768, 50_368, "bfloat16") == 8, "columns in whole lanes"
    assert tile_count(50_305 * 768, 50_305, "bfloat16") == 1, "an odd number of rows"
    assert tile_count(4096 * 512, 4096, "bfloat16") == 1
    assert tile_count(50_304 * 768, 50_304, "float32") == 1, "it gains nothing there"


@pytest.mark.parametrize(("rows", "length", "chunks"), [(8, 1024, 8), (2, 512, 1), (700, 100, 100), (2000, 3, 3)])
def test_positions_at_once(rows, length, chunks):
    """Whole ones of every row, at most 1024 unless there are more rows."""
    params, x_BTD, *_ = jax.eval_shape(functools.partial(example, rows, length, tied=True, bias=False, rows=64))
    form, *_ = chunked_nll._form(
        params, x_BTD, 1, 61, None, chunked_nll._Objective(), numerics("bfloat16"), unconstrained
    )
    assert form.in_tiles(rows, length).chunks == chunks


def test_tiles_need_no_second_matrix(set_tiles):
    """GPT-2's head on 512 tokens of bfloat16, compiled and not run: neither a matrix in bfloat16 nor one to be added;
    and 512 rows of exponentials take no more than the 256 rows of float32 logits of the other form's chunks."""
    shapes = jax.eval_shape(functools.partial(example, 2, 256, tied=True, bias=False, rows=50_304, width=768))

    def temporary():
        compiled = loss_and_gradients.lower(*shapes, softcap=None, chunk=128, dtype="bfloat16").compile()
        return compiled.memory_analysis().temp_size_in_bytes

    tiled = temporary()
    set_tiles(MOST_TILES=1)
    less, matrix, exponentials = temporary() - tiled, 50_304 * 768 * 4, 512 * 50_304 * 2
    print(f"{tiled / 1e6:.0f} MB, {less / 1e6:.0f} MB less; matrix {matrix / 1e6:.0f}, held {exponentials / 1e6:.0f}")
    assert tiled < 2 * exponentials and less > 1.1 * matrix


def test_entries_are_read_and_put_in_by_place():
    x_BTV = jnp.arange(24.0).reshape(2, 3, 4)
    at_BT = jnp.array([[0, 3, -1], [4, 1, 2]])
    inside_BT = (at_BT >= 0) & (at_BT < 4)
    np.testing.assert_array_equal(jnp.where(inside_BT, entries(x_BTV, at_BT), -1), [[0, 7, -1], [-1, 17, 22]])
    wanted = np.array(x_BTV)
    wanted[0, 0, 0] = wanted[0, 1, 3] = wanted[1, 1, 1] = wanted[1, 2, 2] = -1
    np.testing.assert_array_equal(with_entries(x_BTV, jnp.full((2, 3), -1.0), at_BT), wanted)
