"""Head and loss together, a chunk of positions at a time: the logits never exist whole, forward or backward.

Whole, they are the largest array of a step: a batch of 8 x 1024 tokens over 50 304 ids is 1.6 GB of float32, in several
copies. Here the backward pass computes each chunk's logits again from what the head read, at the price of a fourth
matrix product beside the three of the head (Chen et al. 2016, arXiv:1604.06174, on loss and head alone).

Shapes: B batch, T position, C positions of a row in a chunk, D model width, V vocabulary rows; G groups of rows of the
batch, one a device that the batch is split over, and M = B/G · C positions of a group in a chunk.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lm.nn.head import finish_logits, lm_head, target_logit, token_ids, token_nll
from lm.nn.layers import Constrain
from lm.nn.matmul import Numerics, product

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
    row = jax.ShapeDtypeStruct((rows,), jnp.float32)
    placed = jax.make_jaxpr(lambda x_B: constrain(x_B, ("batch",)))(row).eqns
    shardings = [equation.params["sharding"] for equation in placed if "sharding" in equation.params]
    return rows // shardings[-1].shard_shape((rows,))[0] if shardings else 1


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

    Products, bias, cap and padding are those of `lm_head`. The gradients of matrix and bias are summed over chunks in
    float32. A chunk as long as the rows is `lm_head` and `token_nll` themselves.

    Args:
      params: the model's whole tree, as for `lm_head`.
      x_BTD: what the head reads; its gradient has its dtype.
      targets_BT: int32 ids below `vocabulary`.
      chunk: C, at least 1. A row is cut along T, so that a split batch stays where it is.
    """
    B, T, D = x_BTD.shape
    assert chunk > 0
    if chunk >= T:
        logits_BTV = lm_head(
            params, x_BTD, vocabulary=vocabulary, softcap=softcap, numerics=numerics, constrain=constrain
        )
        return token_nll(logits_BTV, targets_BT)
    head = params.get("head", {})
    tied = "kernel" not in head
    w = params["embed"]["tokens"] if tied else head["kernel"]
    chunks = math.ceil(T / chunk)
    form = _Form(tied, vocabulary, softcap, numerics, constrain, batch_shards(constrain, B), chunks)
    C = math.ceil(T / chunks)  # even chunks: fewer than `chunks` positions are padding

    def padded(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, chunks * C - T)) + ((0, 0),) * (x.ndim - 2))

    return _chunked_nll(form, w, head.get("bias"), padded(x_BTD), padded(targets_BT))[:, :T]


class _Form(NamedTuple):
    tied: bool  # w is [V, D], else [D, V]
    vocabulary: int
    softcap: float | None
    numerics: Numerics
    constrain: Constrain
    groups: int  # G
    chunks: int

    def matrix(self, w: Array) -> Array:
        """w in the compute dtype, whole in its D: cast and gathered once, not once a chunk."""
        axes = ("vocab", "width") if self.tied else ("width", "vocab")
        return self.constrain(w.astype(self.numerics.dtype), axes)

    def logits(self, w: Array, bias_V: Array | None, x_GMD: Array) -> Array:
        w_G = jnp.broadcast_to(w[None], (self.groups, *w.shape))
        logits_GMV = self.constrain(product(x_GMD, w_G, self.tied, self.numerics), ("batch", "length", "vocab"))
        return finish_logits(logits_GMV, bias_V, vocabulary=self.vocabulary, softcap=self.softcap)

    def cut(self, x_BT: Array, chunk: Array) -> Array:
        """[B, T, ...] to a chunk of it, [G, M, ...]. A group's rows are neighbours: nothing moves."""
        B, T = x_BT.shape[:2]
        C = T // self.chunks
        x_BC = lax.dynamic_slice_in_dim(x_BT, chunk * C, C, axis=1)
        return x_BC.reshape(self.groups, B // self.groups * C, *x_BT.shape[2:])

    def join(self, chunks_GM: Array, rows: int) -> Array:
        """Chunks [chunks, G, M, ...] to [B, T, ...]."""
        parts = chunks_GM.reshape(self.chunks, rows, -1, *chunks_GM.shape[3:])
        return parts.swapaxes(0, 1).reshape(rows, -1, *chunks_GM.shape[3:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_nll(form: _Form, w: Array, bias_V: Array | None, x_BTD: Array, targets_BT: Array) -> Array:
    return _forward(form, w, bias_V, x_BTD, targets_BT)[0]


def _forward(
    form: _Form, w: Array, bias_V: Array | None, x_BTD: Array, targets_BT: Array
) -> tuple[Array, tuple[Array, Array | None, Array, Array, Array]]:
    """nll_BT, and what the backward pass needs: the arguments and log Σ exp(logits), [B, T]."""
    matrix = form.matrix(w)

    def one(chunk: Array) -> tuple[Array, Array]:
        logits_GMV = form.logits(matrix, bias_V, form.cut(x_BTD, chunk))
        total_GM = jax.nn.logsumexp(logits_GMV, axis=-1)
        return total_GM - target_logit(logits_GMV, form.cut(targets_BT, chunk)), total_GM

    nll, total = lax.map(one, jnp.arange(form.chunks))
    total_BT = form.join(total, x_BTD.shape[0])
    return form.join(nll, x_BTD.shape[0]), (w, bias_V, x_BTD, targets_BT, total_BT)


def _backward(
    form: _Form, saved: tuple[Array, Array | None, Array, Array, Array], g_BT: Array
) -> tuple[Array, Array | None, Array, None]:
    """d nll / d logits = softmax(logits) - onehot(target), times the slope of the cap, 1 - tanh²."""
    w, bias_V, x_BTD, targets_BT, total_BT = saved
    matrix = form.matrix(w)

    def add(sums: tuple[Array, Array | None], chunk: Array) -> tuple[tuple[Array, Array | None], Array]:
        x_GMD = form.cut(x_BTD, chunk)
        logits_GMV = form.logits(matrix, bias_V, x_GMD)
        d_GMV = _logits_gradient(form, logits_GMV, *(form.cut(v, chunk) for v in (targets_BT, total_BT, g_BT)))
        w_G = jnp.broadcast_to(matrix[None], (form.groups, *matrix.shape))
        dx_GMD = product(d_GMV, w_G, not form.tied, form.numerics)
        left, right = (d_GMV, x_GMD) if form.tied else (x_GMD, d_GMV)
        dw_G, db_GV = sums
        dw_G = _place(form, dw_G + product(left.swapaxes(1, 2), right, False, form.numerics))
        db_GV = None if db_GV is None else db_GV + jnp.sum(d_GMV, axis=1)
        return (dw_G, db_GV), dx_GMD.astype(x_BTD.dtype)

    # A sum a group: each device adds up its own rows, and the devices are summed once, after the last chunk.
    dw_G = _place(form, jnp.zeros((form.groups, *w.shape), jnp.float32))
    db_GV = None if bias_V is None else jnp.zeros((form.groups, *bias_V.shape), jnp.float32)
    (dw_G, db_GV), dx = lax.scan(add, (dw_G, db_GV), jnp.arange(form.chunks))
    db_V = None if bias_V is None or db_GV is None else db_GV.sum(0).astype(bias_V.dtype)
    return dw_G.sum(0).astype(w.dtype), db_V, form.join(dx, x_BTD.shape[0]), None


_chunked_nll.defvjp(_forward, _backward)


def _logits_gradient(form: _Form, logits_GMV: Array, targets_GM: Array, total_GM: Array, g_GM: Array) -> Array:
    """The gradient of a head's product, before bias and cap."""
    ids_GMV = token_ids(logits_GMV)
    softmax_GMV = jnp.exp(logits_GMV - total_GM[:, :, None])
    d_GMV = (softmax_GMV - (ids_GMV == targets_GM[:, :, None])) * g_GM[:, :, None]
    if form.softcap is not None:
        slope_GMV = 1.0 - jnp.square(logits_GMV / form.softcap)
        d_GMV = jnp.where(ids_GMV < form.vocabulary, d_GMV * slope_GMV, 0.0)  # -inf past the vocabulary
    return d_GMV


def _place(form: _Form, w_G: Array) -> Array:
    return form.constrain(w_G, ("batch", "vocab", "width") if form.tied else ("batch", "width", "vocab"))
