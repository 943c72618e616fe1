"""The chunked loss is the whole one in every form of the head, and its logits never exist whole."""

from __future__ import annotations

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import ParallelConfig, RunConfig
from lm.nn import chunked_nll, language_model
from lm.nn import params as declare
from lm.nn.chunked_nll import batch_shards, chunk_length, head_loss, head_nll
from lm.nn.language_model import unconstrained
from lm.nn.matmul import numerics
from lm.parallel import constrainer, make_mesh, sharding

from ..conftest import SHAPES

D, VOCABULARY = 12, 61
FORMS = {
    "tied": {"tied": True, "bias": False, "softcap": None, "rows": VOCABULARY},
    "tied, padded, capped": {"tied": True, "bias": False, "softcap": 2.0, "rows": 64},
    "untied, padded, bias": {"tied": False, "bias": True, "softcap": None, "rows": 64},
    "untied, padded, bias, capped": {"tied": False, "bias": True, "softcap": 2.0, "rows": 64},
}


def example(B, T, *, tied, bias, rows, width=D):
    """Head parameters, what the head reads, targets and weights of either sign with zeros among them."""
    keys = jax.random.split(jax.random.key(0), 6)
    w = jax.random.normal(keys[0], (rows, width))
    params = {"embed": {"tokens": w}} if tied else {"head": {"kernel": w.T}}
    if bias:
        params.setdefault("head", {})["bias"] = jax.random.normal(keys[1], (rows,))
    x_BTD, targets_BT = jax.random.normal(keys[2], (B, T, width)), jax.random.randint(keys[3], (B, T), 0, VOCABULARY)
    return params, x_BTD, targets_BT, jax.random.normal(keys[4], (B, T)) * jax.random.bernoulli(keys[5], 0.8, (B, T))


@functools.partial(jax.jit, static_argnames=("softcap", "chunk", "z_loss", "dtype", "constrain", "label_smoothing"))
def loss_and_gradients(
    params, x_BTD, targets_BT, weights_BT, *, softcap, chunk, z_loss=None, dtype="float32", constrain=unconstrained,
    label_smoothing=None,
):  # fmt: skip
    """((objective, nats), the objective's gradients)."""

    def loss(params, x_BTD):
        return head_loss(
            params, x_BTD.astype(numerics(dtype).dtype), targets_BT, weights_BT, vocabulary=VOCABULARY,
            softcap=softcap, z_loss=z_loss, numerics=numerics(dtype), constrain=constrain, chunk=chunk,
            label_smoothing=label_smoothing,
        )  # fmt: skip

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x_BTD)


@functools.partial(jax.jit, static_argnames=("softcap", "chunk"))
def losses(params, x_BTD, targets_BT, *, softcap, chunk):
    return head_nll(
        params, x_BTD, targets_BT, vocabulary=VOCABULARY, softcap=softcap, numerics=numerics("float32"),
        constrain=unconstrained, chunk=chunk,
    )  # fmt: skip


def assert_same(got, wanted, *, loss, gradient):
    """Relative tolerances: of the sums, and of the largest entry of every gradient."""
    np.testing.assert_allclose(got[0], wanted[0], rtol=loss, atol=loss)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got[1]), jax.tree.leaves(wanted[1]), strict=True):
        assert a.dtype == b.dtype and np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, atol=gradient * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("form", FORMS)
def test_any_chunk_gives_the_whole_loss_and_gradients(form):
    """float32: 1e-6 a loss, 1e-5 their sum; 1e-5 a gradient, whose sum over positions is in another order."""
    shape = dict(FORMS[form])
    softcap = shape.pop("softcap")
    arguments = example(2, 12, **shape)
    whole = loss_and_gradients(*arguments, softcap=softcap, chunk=12, z_loss=0.1)
    each = losses(*arguments[:3], softcap=softcap, chunk=12)
    assert whole[0][0] != whole[0][1]
    for chunk in (1, 5):  # divide T and not
        chunked = loss_and_gradients(*arguments, softcap=softcap, chunk=chunk, z_loss=0.1)
        assert_same(chunked, whole, loss=1e-5, gradient=1e-5)
        np.testing.assert_allclose(losses(*arguments[:3], softcap=softcap, chunk=chunk), each, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunk", [12, 5])
@pytest.mark.parametrize(("z_loss", "smoothing"), [(None, None), (0.1, None), (None, 0.1), (0.1, 0.2)])
def test_the_objective_is_nats_and_log_z_squared_and_smoothed(chunk, z_loss, smoothing):
    """Against `jax.grad` of the formula itself, with a factor on the objective: float32, another order of sums."""
    params, x_BTD, targets_BT, weights_BT = example(2, 12, tied=False, bias=True, rows=64)

    def plain(params, x_BTD):
        logits_BTV = 2.0 * jnp.tanh((x_BTD @ params["head"]["kernel"] + params["head"]["bias"][None, None]) / 2.0)
        logits_BTV = logits_BTV[..., :VOCABULARY]
        log_z_BT = jnp.log(jnp.exp(logits_BTV).sum(-1))
        nll_BT = log_z_BT - jnp.take_along_axis(logits_BTV, targets_BT[..., None], -1)[..., 0]
        soft_BTV = (1.0 - (smoothing or 0.0)) * jax.nn.one_hot(targets_BT, VOCABULARY) + (smoothing or 0.0) / VOCABULARY
        minimised_BT = jnp.sum(soft_BTV * (log_z_BT[..., None] - logits_BTV), -1) + (z_loss or 0.0) * log_z_BT**2
        return 3.0 * jnp.sum(weights_BT * minimised_BT), jnp.sum(weights_BT * nll_BT)

    def ours(params, x_BTD):
        objective, nats = head_loss(
            params, x_BTD, targets_BT, weights_BT, vocabulary=VOCABULARY, softcap=2.0, z_loss=z_loss,
            numerics=numerics("float32"), constrain=unconstrained, chunk=chunk, label_smoothing=smoothing,
        )  # fmt: skip
        return 3.0 * objective, nats

    got, wanted = (jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(params, x_BTD) for f in (ours, plain))
    assert_same(got, wanted, loss=1e-5, gradient=1e-5)


@pytest.mark.parametrize("chunk", [12, 5])
def test_label_smoothing_moves_the_objective_and_not_the_nats(chunk):
    """Against NumPy in float64, with rows of padding in the vocabulary: ε is spread over the real ids alone."""
    params, x_BTD, targets_BT, weights_BT = example(2, 12, tied=False, bias=True, rows=64)
    objective, nats = head_loss(
        params, x_BTD, targets_BT, weights_BT, vocabulary=VOCABULARY, softcap=None, z_loss=None,
        numerics=numerics("float32"), constrain=unconstrained, chunk=chunk, label_smoothing=0.1,
    )  # fmt: skip
    kernel, bias, x, weights = (
        np.asarray(a, np.float64) for a in (params["head"]["kernel"], params["head"]["bias"], x_BTD, weights_BT)
    )
    logits = (x @ kernel + bias)[..., :VOCABULARY]
    minus_log_p = np.log(np.exp(logits).sum(-1, keepdims=True)) - logits
    nll = np.take_along_axis(minus_log_p, np.asarray(targets_BT)[..., None], -1)[..., 0]
    wanted = (weights * (0.9 * nll + 0.1 * minus_log_p.mean(-1))).sum()
    np.testing.assert_allclose([objective, nats], [wanted, (weights * nll).sum()], rtol=1e-5)
    assert abs(objective - nats) > 0.01


def test_each_loss_has_a_gradient_too():
    """Not what training uses: for whoever asks of one token what moves its loss."""
    params, x_BTD, targets_BT, _ = example(2, 12, tied=True, bias=False, rows=64)
    one, whole = (
        jax.grad(lambda x_BTD, chunk=chunk: losses(params, x_BTD, targets_BT, softcap=2.0, chunk=chunk)[1, 7])(x_BTD)
        for chunk in (5, 12)
    )
    np.testing.assert_allclose(one, whole, atol=1e-6)


@pytest.mark.parametrize(("B", "T"), [(1, 3), (3, 65), (1, 127), (65, 3)])
def test_odd_shapes(B, T):
    arguments = example(B, T, tied=False, bias=True, rows=65)
    whole = loss_and_gradients(*arguments, softcap=None, chunk=T)
    assert_same(loss_and_gradients(*arguments, softcap=None, chunk=2), whole, loss=1e-5, gradient=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_rounds_as_the_whole_form_does(tied):
    """Operands in bfloat16, sums in float32: they differ only where a gradient of the logits rounds the other way."""
    arguments = example(3, 65, tied=tied, bias=True, rows=64)
    whole = loss_and_gradients(*arguments, softcap=None, chunk=65, dtype="bfloat16")
    chunked = loss_and_gradients(*arguments, softcap=None, chunk=8, dtype="bfloat16")
    assert_same(chunked, whole, loss=1e-5, gradient=4e-3)  # half a unit in bfloat16's last place
    exact = loss_and_gradients(*arguments, softcap=None, chunk=8)
    assert abs(chunked[0][0] - exact[0][0]) > 1e-4, "bfloat16 must not compute in float32"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_product_keeps_to_the_contract(dtype):
    """Operands in the compute dtype, sums in float32, HIGHEST for float32; three products, none over all positions."""
    arguments = example(2, 12, tied=True, bias=False, rows=64)
    text = loss_and_gradients.lower(*arguments, softcap=None, chunk=4, dtype=dtype).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    kind = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    assert len(dots) == 3, "nothing is computed again"
    for line in dots:
        assert re.search(
            rf"\(tensor<\d+x\d+x\d+x{kind}>, tensor<\d+x\d+x\d+x{kind}>\) -> tensor<\d+x\d+x\d+xf32>", line
        )
        assert ("HIGHEST" in line) == (dtype == "float32")
    assert "2x12x64" not in text and "24x64" not in text


def test_a_chunk_of_whole_rows_is_the_whole_form_exactly():
    arguments = example(2, 12, tied=True, bias=False, rows=64)
    whole = loss_and_gradients.lower(*arguments, softcap=None, chunk=12).as_text()
    assert "while" not in whole and loss_and_gradients.lower(*arguments, softcap=None, chunk=100).as_text() == whole


def test_memory_falls_by_the_logits():
    """GPT-2's head on 1024 tokens, compiled and not run: the whole form keeps at least their logits more, 206 MB."""
    B, T, width, rows = 2, 512, 768, 50_304
    shapes = jax.eval_shape(functools.partial(example, B, T, tied=True, bias=False, rows=rows, width=width))

    def temporary(chunk):
        compiled = loss_and_gradients.lower(*shapes, softcap=None, chunk=chunk).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    chunk = chunk_length(B, width, rows)
    logits = B * T * rows * 4
    whole, chunked = temporary(T), temporary(chunk)
    print(f"{whole / 1e6:.0f} MB whole, {chunked / 1e6:.0f} MB in chunks, {logits / 1e6:.0f} MB logits")
    assert whole - chunked > logits
    assert chunk < T


def test_all_ids_are_compared_with_targets_only_where_the_vocabulary_may_be_split(monkeypatch):
    """On a CPU that holds it whole targets are read and put in by their place, with the same gradients to the bit."""
    arguments = example(2, 12, tied=True, bias=False, rows=64)
    options = {"softcap": 2.0, "chunk": 4, "z_loss": 0.1, "label_smoothing": 0.1}
    compared = re.compile(r"compare +EQ.*tensor<1x8x64xi32>")
    here, text = loss_and_gradients(*arguments, **options), loss_and_gradients.lower(*arguments, **options).as_text()
    monkeypatch.setattr(chunked_nll, "_by_place", lambda form, local, anywhere, *args: anywhere(*args))
    loss_and_gradients.clear_cache()
    there, other = loss_and_gradients(*arguments, **options), loss_and_gradients.lower(*arguments, **options).as_text()
    loss_and_gradients.clear_cache()
    assert not compared.search(text) and compared.search(other)
    assert_same(here, there, loss=0, gradient=0)


def test_a_vocabulary_counts_as_split_where_the_mesh_splits_it():
    parts = chunked_nll._shards(constrainer(make_mesh(ParallelConfig(tensor=8))), 64, "vocab")
    assert parts == 8 and chunked_nll._shards(unconstrained, 64, "vocab") == 1


def test_the_model_never_makes_its_logits():
    """Traced alone. `logits` does make them."""
    model = RunConfig(model=SHAPES["modern"]).resolve(8192).model
    specs = language_model.model_specs(model)
    tree = declare.map_specs(lambda spec: jax.ShapeDtypeStruct(spec.shape, "float32"), specs)
    tokens_BT, weights_BT = (jax.ShapeDtypeStruct((4, 512), dtype) for dtype in ("int32", "float32"))

    def loss(tree, tokens_BT, weights_BT):
        return language_model.loss(
            tree, tokens_BT, tokens_BT, weights_BT, None, tokens_BT, cfg=model, z_loss=1e-4, dropout_keys_B=None,
            constrain=unconstrained,
        )[0]  # fmt: skip

    def whole_logits(tree, tokens_BT, weights_BT):
        return language_model.apply(tree, tokens_BT, cfg=model).sum()

    def text(form):
        return str(jax.make_jaxpr(jax.grad(form))(tree, tokens_BT, weights_BT))

    whole = re.compile(r"f32\[(4,512|2048),8192\]")
    assert not whole.search(text(loss))
    assert whole.search(text(whole_logits))


def test_the_chunk_rule():
    for rows, width, vocabulary in itertools.product((1, 8, 480), (128, 4096), (64, 4096, 50_304, 262_144)):
        positions = rows * chunk_length(rows, width, vocabulary)
        least = max(chunked_nll.CHUNK_POSITIONS, width)
        assert least - rows < positions
        assert positions * vocabulary <= max(chunked_nll.CHUNK_ENTRIES, max(least, rows) * vocabulary)
    assert chunk_length(16, 128, 64) >= 1024, "a small vocabulary is a single chunk"


@pytest.mark.parametrize("parallel", [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_any_mesh_gives_the_same_numbers_and_moves_no_activations(parallel, tied):
    """Nothing but the matrix is gathered, and its gradient is reduced once, after the loop over chunks."""
    B, T, rows, width = 8, 12, 64, 16
    arguments = example(B, T, tied=tied, bias=True, rows=rows, width=width)
    mesh = make_mesh(ParallelConfig(**parallel))
    constrain = constrainer(mesh)
    assert batch_shards(constrain, B) == 8 // parallel.get("tensor", 1) and batch_shards(unconstrained, B) == 1
    whole = loss_and_gradients(*arguments, softcap=2.0, chunk=T)

    def place(x, *axes):
        return jax.device_put(x, sharding(mesh, x.shape, axes))

    params, x_BTD, targets_BT, g_BT = arguments
    params["head"]["bias"] = place(params["head"]["bias"], "vocab")
    if tied:
        params["embed"]["tokens"] = place(params["embed"]["tokens"], "vocab", "embed")
    else:
        params["head"]["kernel"] = place(params["head"]["kernel"], "embed", "vocab")
    placed = (
        params,
        place(x_BTD, "batch", "length", "width"),
        *(place(v, "batch", "length") for v in (targets_BT, g_BT)),
    )
    compiled = loss_and_gradients.lower(*placed, softcap=2.0, chunk=5, constrain=constrain).compile()
    assert_same(compiled(*placed), whole, loss=1e-5, gradient=1e-5)

    inside = re.split(r"^ENTRY", compiled.as_text(), flags=re.MULTILINE)[0]
    assert ("all-reduce" in inside) == ("tensor" in parallel)  # over a split vocabulary the chunk itself is a sum
    for moved in re.findall(r"= (.*) (?:all-gather|all-to-all|collective-permute)\(", compiled.as_text()):
        part = rows // parallel.get("tensor", 1)
        assert re.match(rf"f32\[({part},{width}|{width},{part})\]", moved), moved
