"""Head and loss together, a chunk of positions at a time: the logits never exist whole, forward or backward.

Whole, they are the largest array of a step: a batch of 8 x 1024 tokens over 50 304 ids is 1.6 GB of float32, in several
copies. The loss of training is one weighted sum, so that the gradient of each chunk's logits is known as soon as they
are: all gradients are made in the forward pass, by the three products of the head, and nothing is computed again.

Shapes: B batch, T position, C positions of a row in a chunk, D model width, V vocabulary rows; G groups of rows of the
batch, one a device that the batch is split over, and M = B/G · C positions of a group in a chunk.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lm.nn import tiled_nll
from lm.nn.head import (
    entries,
    finish_logits,
    lm_head,
    target_logit,
    token_ids,
    token_nll,
    uniform_nll,
    with_entries,
)
from lm.nn.layers import Constrain
from lm.nn.matmul import Numerics, product, sum_of_rows

Array = jax.Array

CHUNK_ENTRIES = 2**20
CHUNK_POSITIONS = 256


def chunk_length(rows: int, width: int, vocabulary_rows: int) -> int:
    """C for `rows` rows on a device: the positions of each whose logits, [rows, C, V], are computed at once.

    The logits of a small vocabulary fill a cache, 4 MB. Of a large one they come from D positions: no more memory than
    the gradient of the head's matrix takes, and adding to that gradient moves no more bytes than they do. Below 256
    positions the matrix is read too often for what is computed from it.
    """
    positions = max(CHUNK_ENTRIES // vocabulary_rows, width, CHUNK_POSITIONS)
    return max(positions // rows, 1)


def batch_shards(constrain: Constrain, rows: int) -> int:
    """The devices that `constrain` splits a batch over; one where it leaves arrays alone."""
    return _shards(constrain, rows, "batch")


def _shards(constrain: Constrain, length: int, axis: str) -> int:
    """The devices that `constrain` splits an axis of so many over."""
    line = jax.ShapeDtypeStruct((length,), jnp.float32)
    placed = jax.make_jaxpr(lambda x: constrain(x, (axis,)))(line).eqns
    shardings = [equation.params["sharding"] for equation in placed if "sharding" in equation.params]
    split = bool(shardings) and any(shardings[-1].spec)  # of no split, JAX 0.10 doesn't give the shape inside shard_map
    return length // shardings[-1].shard_shape((length,))[0] if split else 1


def head_nll(
    params: dict[str, Any],
    x_BTD: Array,
    targets_BT: Array,
    *,
    vocabulary: int,
    softcap: float | None,
    numerics: Numerics,
    constrain: Constrain,
    chunk: int,
) -> Array:
    """nll_BT = logsumexp(logits) - logits[target], in nats, float32: `token_nll` of `lm_head`, chunk by chunk.

    Products, bias, cap and padding are those of `lm_head`. Its gradient computes every chunk again. A chunk as long as
    the rows is `lm_head` and `token_nll` themselves.

    Args:
      params: the model's whole tree, as for `lm_head`.
      x_BTD: what the head reads; its gradient has its dtype.
      targets_BT: int32 ids below `vocabulary`.
      chunk: C, at least 1. A row is cut along T, so that a split batch stays where it is.
    """
    T = x_BTD.shape[1]
    if chunk >= T:
        logits_BTV = lm_head(
            params, x_BTD, vocabulary=vocabulary, softcap=softcap, numerics=numerics, constrain=constrain
        )
        return token_nll(logits_BTV, targets_BT)
    form, w, bias_V = _form(params, x_BTD, chunk, vocabulary, softcap, _Objective(), numerics, constrain)
    return _losses(form, w, bias_V, x_BTD, targets_BT).nll


def head_loss(
    params: dict[str, Any],
    x_BTD: Array,
    targets_BT: Array,
    weights_BT: Array,
    *,
    vocabulary: int,
    softcap: float | None,
    z_loss: float | None,
    numerics: Numerics,
    constrain: Constrain,
    chunk: int,
    label_smoothing: float | None = None,
) -> tuple[Array, Array]:
    """The objective, Σ weight · ((1 - ε) nll + ε u + z_loss · log² Z), and Σ weight · nll in nats: float32 scalars.

    Z = Σ exp(logits); holding log Z near 0 keeps the logits from drifting (PaLM, arXiv:2204.02311, section 5; ST-MoE,
    arXiv:2202.08906, section 3.3, for routers). u is the mean of -log p over the vocabulary: with ε, `label_smoothing`,
    the target is (1 - ε) of itself and ε spread evenly over all ids (Szegedy et al. 2016, arXiv:1512.00567, section 7).
    The gradients are the objective's; nats are a report and carry none. Those of matrix and bias are summed over chunks
    in float32.

    Args: as for `head_nll`, and
      weights_BT: float32; constants.
      z_loss, label_smoothing: None: off; with both off the objective is the nats.
      chunk: C, but where the matrix is taken by tiles, which take positions as `lm.nn.tiled_nll` says.
    """
    T, objective = x_BTD.shape[1], _Objective(z_loss, label_smoothing)
    if chunk >= T:
        logits_BTV = lm_head(
            params, x_BTD, vocabulary=vocabulary, softcap=softcap, numerics=numerics, constrain=constrain
        )
        return objective.sums(objective.losses(logits_BTV, targets_BT, vocabulary), weights_BT)
    form, w, bias_V = _form(params, x_BTD, chunk, vocabulary, softcap, objective, numerics, constrain)
    return _chunked_loss(form, w, bias_V, x_BTD, targets_BT, weights_BT)


def _form(
    params: dict[str, Any],
    x_BTD: Array,
    chunk: int,
    vocabulary: int,
    softcap: float | None,
    objective: _Objective,
    numerics: Numerics,
    constrain: Constrain,
) -> tuple[_Form, Array, Array | None]:
    """How the head is computed, its matrix and its bias."""
    assert chunk > 0
    head, chunks = params.get("head", {}), math.ceil(x_BTD.shape[1] / chunk)
    tied = "kernel" not in head
    w = params["embed"]["tokens"] if tied else head["kernel"]
    groups = batch_shards(constrain, x_BTD.shape[0])
    V = w.shape[0 if tied else 1]
    local = groups == _shards(constrain, V, "vocab") == 1
    bias_V = head.get("bias")
    tiled = local and bias_V is None and objective.smoothing is None
    tiles = tiled_nll.tile_count(w.size, V, numerics.dtype) if tiled else 1
    return _Form(tied, vocabulary, softcap, objective, numerics, constrain, groups, chunks, local, tiles), w, bias_V


class _Losses(NamedTuple):
    """Of every token, [B, T], float32: nll, log Z, the mean of -log p, which only smoothing asks for, and
    the target's logit."""

    nll: Array
    log_z: Array
    uniform: Array | None
    logit: Array


class _Objective(NamedTuple):
    """What is minimised besides nll; None: off."""

    z_loss: float | None = None
    smoothing: float | None = None

    def losses(self, logits_BTV: Array, targets_BT: Array, vocabulary: int, *, local: bool = False) -> _Losses:
        """`local`: as `_Form.local`, on a CPU."""
        log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
        own_BT = entries(logits_BTV, targets_BT) if local else target_logit(logits_BTV, targets_BT)
        smooth = self.smoothing is not None
        uniform_BT = uniform_nll(logits_BTV, log_z_BT, vocabulary=vocabulary) if smooth else None
        return _Losses(log_z_BT - own_BT, log_z_BT, uniform_BT, own_BT)

    def sums(self, found: _Losses, weights_BT: Array) -> tuple[Array, Array]:
        """(objective, nats)."""
        objective = nats = jnp.sum(found.nll * weights_BT)
        if self.smoothing is not None and found.uniform is not None:
            objective = objective + self.smoothing * jnp.sum((found.uniform - found.nll) * weights_BT)
        if self.z_loss is not None:
            objective = objective + self.z_loss * jnp.sum(jnp.square(found.log_z) * weights_BT)
        return objective, nats


class _Form(NamedTuple):
    tied: bool  # w is [V, D], else [D, V]
    vocabulary: int
    softcap: float | None
    objective: _Objective
    numerics: Numerics
    constrain: Constrain
    groups: int  # G
    chunks: int
    local: bool  # rows and vocabulary lie whole on a device
    tiles: int  # of the matrix, on a CPU

    def matrix(self, w: Array) -> Array:
        """w in the compute dtype, whole in its D: cast and gathered once, not once a chunk."""
        axes = ("vocab", "width") if self.tied else ("width", "vocab")
        return self.constrain(w.astype(self.numerics.dtype), axes)

    def product(self, matrix: Array, x_GMK: Array, *, back: bool = False) -> Array:
        """x · matrix, [G, M, V], float32; or `back`, of a gradient of that, [G, M, D]."""
        w_G = jnp.broadcast_to(matrix[None], (self.groups, *matrix.shape))
        return product(x_GMK, w_G, self.tied != back, self.numerics)

    def matrix_gradient(self, d_GMV: Array, x_GMD: Array) -> Array:
        """The gradient of w by a gradient of `product`, as w and a G before it, float32."""
        return sum_of_rows(*((d_GMV, x_GMD) if self.tied else (x_GMD, d_GMV)), self.numerics)

    def in_tiles(self, rows: int, length: int) -> _Form:
        """With chunks of as many positions as tiles take, of so many rows of that length."""
        return self._replace(chunks=math.ceil(length / max(tiled_nll.TILE_POSITIONS // rows, 1)))

    def finish(self, logits_GMV: Array, bias_V: Array | None) -> Array:
        """The logits of what `product` gives."""
        logits_GMV = self.constrain(logits_GMV, ("batch", "length", "vocab"))
        return finish_logits(logits_GMV, bias_V, vocabulary=self.vocabulary, softcap=self.softcap)

    def pad(self, x_BT: Array) -> Array:
        """[B, T, ...] to a T of even chunks: fewer than `chunks` positions are padding."""
        longer = -x_BT.shape[1] % self.chunks
        return jnp.pad(x_BT, ((0, 0), (0, longer)) + ((0, 0),) * (x_BT.ndim - 2))

    def cut(self, x_BT: Array, chunk: Array) -> Array:
        """[B, T, ...] to a chunk of it, [G, M, ...]. A group's rows are neighbours: nothing moves."""
        B, T = x_BT.shape[:2]
        C = T // self.chunks
        x_BC = lax.dynamic_slice_in_dim(x_BT, chunk * C, C, axis=1)
        return x_BC.reshape(self.groups, B // self.groups * C, *x_BT.shape[2:])

    def join(self, chunks_GM: Array, like_BT: Array) -> Array:
        """Chunks [chunks, G, M, ...] to [B, T, ...], without padding."""
        B, T = like_BT.shape[:2]
        parts = chunks_GM.reshape(self.chunks, B, -1, *chunks_GM.shape[3:])
        return parts.swapaxes(0, 1).reshape(B, -1, *chunks_GM.shape[3:])[:, :T]


def _losses(form: _Form, w: Array, bias_V: Array | None, x_BTD: Array, targets_BT: Array) -> _Losses:
    padded = form.pad(x_BTD), form.pad(targets_BT)

    def run(w: Array, bias_V: Array | None, *, local: bool) -> _Losses:
        matrix = form.matrix(w)

        @jax.checkpoint
        def one(chunk: Array) -> _Losses:
            x_GMD, targets_GM = (form.cut(v, chunk) for v in padded)
            logits_GMV = form.finish(form.product(matrix, x_GMD), bias_V)
            return form.objective.losses(logits_GMV, targets_GM, form.vocabulary, local=local)

        return jax.tree.map(lambda part: form.join(part, targets_BT), lax.map(one, jnp.arange(form.chunks)))

    return _by_place(form, functools.partial(run, local=True), functools.partial(run, local=False), w, bias_V)


def _by_place(form: _Form, local: Callable[..., Any], anywhere: Callable[..., Any], *args: Any) -> Any:
    """local(*args) on a CPU whose rows and vocabulary lie whole; else anywhere(*args).

    There the target's entry of a row is read, or replaced, by its place. To compare all ids with the target takes as
    long as their exponentials do; but it moves nothing where a vocabulary is split, and is fast on accelerators.
    """
    return lax.platform_dependent(*args, cpu=local, default=anywhere) if form.local else anywhere(*args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_loss(
    form: _Form, w: Array, bias_V: Array | None, x_BTD: Array, targets_BT: Array, weights_BT: Array
) -> tuple[Array, Array]:
    return form.objective.sums(_losses(form, w, bias_V, x_BTD, targets_BT), weights_BT)


def _forward(
    form: _Form, w: Array, bias_V: Array | None, x_BTD: Array, targets_BT: Array, weights_BT: Array
) -> tuple[tuple[Array, Array], tuple[Array, Array | None, Array]]:
    """The sums, and the gradients of the objective: of the matrix, the bias and x."""

    def run(form: _Form, add: Callable[..., tuple[_Sums, _Losses, Array]]) -> tuple[Any, Any]:
        padded = [form.pad(v) for v in (x_BTD, targets_BT, weights_BT)]

        def one(sums: _Sums, chunk: Array) -> tuple[_Sums, tuple[_Losses, Array]]:
            sums, losses_GM, dx_GMD = add(form, sums, *(form.cut(v, chunk) for v in padded))
            return sums, (losses_GM, dx_GMD.astype(x_BTD.dtype))

        # A sum a group: each device adds up its own rows, and the devices are summed once, after the last chunk.
        dw_G = _place(form, jnp.zeros((form.groups, *w.shape), jnp.float32))
        sums = _Sums(dw_G, None if bias_V is None else jnp.zeros((form.groups, *bias_V.shape), jnp.float32))
        sums, parts = lax.scan(one, sums, jnp.arange(form.chunks))
        losses_BT, dx_BTD = jax.tree.map(lambda part: form.join(part, targets_BT), parts)
        db_V = None if sums.bias is None or bias_V is None else sums.bias.sum(0).astype(bias_V.dtype)
        gradients = sums.matrix.sum(0).astype(w.dtype), db_V, dx_BTD
        return form.objective.sums(losses_BT, weights_BT), gradients

    def whole(w: Array, bias_V: Array | None, *, local: bool) -> tuple[Any, Any]:
        return run(form, functools.partial(_add_whole, form.matrix(w), bias_V, local))

    def tiled(w: Array, _: None) -> tuple[Any, Any]:
        return run(form.in_tiles(*targets_BT.shape), functools.partial(_add_tiled, w))

    local = tiled if form.tiles > 1 else functools.partial(whole, local=True)
    return _by_place(form, local, functools.partial(whole, local=False), w, bias_V)


def _backward(
    form: _Form, gradients: tuple[Array, Array | None, Array], cotangents: tuple[Array, Array]
) -> tuple[Array, Array | None, Array, None, None]:
    g, _ = cotangents  # of the objective: in training 1, which the compiler leaves out
    dw, db_V, dx_BTD = jax.tree.map(lambda gradient: (g * gradient).astype(gradient.dtype), gradients)
    return dw, db_V, dx_BTD, None, None


_chunked_loss.defvjp(_forward, _backward)


class _Sums(NamedTuple):
    """The gradients that chunks add to, float32: of the matrix, as w and a G before it, and of the bias, [G, V]."""

    matrix: Array
    bias: Array | None


def _add_whole(
    matrix: Array,
    bias_V: Array | None,
    local: bool,
    form: _Form,
    sums: _Sums,
    x_GMD: Array,
    targets_GM: Array,
    weights_GM: Array,
) -> tuple[_Sums, _Losses, Array]:
    """A chunk's gradients added to the sums, its losses, and the gradient of x. matrix: as `form.matrix` has it."""
    logits_GMV = form.finish(form.product(matrix, x_GMD), bias_V)
    losses_GM = form.objective.losses(logits_GMV, targets_GM, form.vocabulary, local=local)
    is_real_GMV = token_ids(logits_GMV) < form.vocabulary
    if local:
        held = form.numerics.dtype if bias_V is None else jnp.float32  # of which a bias is the float32 sum
        d_GMV = _local_gradient(form, logits_GMV, is_real_GMV, losses_GM, targets_GM, weights_GM, held)
    else:
        is_target_GMV = token_ids(logits_GMV) == targets_GM[:, :, None]
        d_GMV = _logits_gradient(form, logits_GMV, is_target_GMV, is_real_GMV, losses_GM.log_z, weights_GM)
    matrix_sum = _place(form, sums.matrix + form.matrix_gradient(d_GMV, x_GMD))
    bias_sum = None if sums.bias is None else sums.bias + jnp.sum(d_GMV, axis=1)
    return _Sums(matrix_sum, bias_sum), losses_GM, form.product(matrix, d_GMV, back=True)


def _add_tiled(
    w: Array, form: _Form, sums: _Sums, x_GMD: Array, targets_GM: Array, weights_GM: Array
) -> tuple[_Sums, _Losses, Array]:
    """`_add_whole` of a single group, without a bias or smoothing, by tiles of the matrix."""
    found = tiled_nll.tiled_loss(
        w, x_GMD[0], targets_GM[0], weights_GM[0], sums.matrix[0], fresh=form.chunks == 1, tied=form.tied,
        tiles=form.tiles, vocabulary=form.vocabulary, softcap=form.softcap, z_loss=form.objective.z_loss,
        numerics=form.numerics,
    )  # fmt: skip
    log_z_GM, logit_GM = found.log_z_M[None], found.logit_M[None]
    losses_GM = _Losses(log_z_GM - logit_GM, log_z_GM, None, logit_GM)
    return _Sums(found.dw[None], None), losses_GM, found.dx_MD[None]


def _logits_gradient(
    form: _Form, logits_GMV: Array, is_target_GMV: Array, is_real_GMV: Array, log_z_GM: Array, weights_GM: Array
) -> Array:
    """The gradient of a head's product, before bias and cap; real: below `vocabulary`.

    Of nll it is softmax(logits) - onehot(target), with smoothing softmax(logits) - (1 - ε) onehot(target) - ε / V; of
    log² Z 2 log Z · softmax; the cap has the slope 1 - tanh².
    """
    softmax_GMV = jnp.exp(logits_GMV - log_z_GM[:, :, None])
    z_loss, smoothing = form.objective
    if z_loss is not None:
        softmax_GMV = softmax_GMV * (1.0 + 2.0 * z_loss * log_z_GM)[:, :, None]
    target_GMV: Array = is_target_GMV
    if smoothing is not None:
        target_GMV = (1.0 - smoothing) * target_GMV + jnp.where(is_real_GMV, smoothing / form.vocabulary, 0.0)
    d_GMV = (softmax_GMV - target_GMV) * weights_GM[:, :, None]
    if form.softcap is not None:
        slope_GMV = 1.0 - jnp.square(logits_GMV / form.softcap)
        d_GMV = jnp.where(is_real_GMV, d_GMV * slope_GMV, 0.0)  # -inf past the vocabulary
    return d_GMV


def _local_gradient(
    form: _Form,
    logits_GMV: Array,
    is_real_GMV: Array,
    losses_GM: _Losses,
    targets_GM: Array,
    weights_GM: Array,
    dtype: Any,
) -> Array:
    """`_logits_gradient` in that dtype, where it is that of no target, with the targets' put in."""
    true = jnp.ones((1, 1, 1), bool)
    d_GMV = _logits_gradient(form, logits_GMV, ~true, is_real_GMV, losses_GM.log_z, weights_GM)
    own_GM1 = _logits_gradient(form, losses_GM.logit[:, :, None], true, true, losses_GM.log_z, weights_GM)
    return with_entries(d_GMV.astype(dtype), own_GM1[:, :, 0].astype(dtype), targets_GM)


def _place(form: _Form, w_G: Array) -> Array:
    return form.constrain(w_G, ("batch", "vocab", "width") if form.tied else ("batch", "width", "vocab"))
