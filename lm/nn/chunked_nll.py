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

from lm.nn.head import finish_logits, lm_head, token_ids, token_losses, token_nll, uniform_nll
from lm.nn.layers import Constrain
from lm.nn.matmul import Numerics, product, sum_of_rows

Array = jax.Array

CHUNK_ENTRIES = 2**20
CHUNK_POSITIONS = 256
TILE_ENTRIES, MOST_TILES = 2**22, 8
"""On a CPU a large matrix is taken tile by tile, in all three products: none of them needs a copy of it in the compute
dtype, or something of its size to be added to its gradient."""


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


def _tiles(entries: int, vocabulary_rows: int) -> int:
    """Equal parts of a matrix's vocabulary rows."""
    tiles = 1
    while 2 * tiles <= MOST_TILES and vocabulary_rows % (2 * tiles) == 0 and entries >= 2 * tiles * TILE_ENTRIES:
        tiles *= 2
    return tiles


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
    return _losses(form, w, bias_V, form.pad(x_BTD), form.pad(targets_BT)).nll[:, :T]


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
    """
    T, objective = x_BTD.shape[1], _Objective(z_loss, label_smoothing)
    if chunk >= T:
        logits_BTV = lm_head(
            params, x_BTD, vocabulary=vocabulary, softcap=softcap, numerics=numerics, constrain=constrain
        )
        return objective.sums(objective.losses(logits_BTV, targets_BT, vocabulary), weights_BT)
    form, w, bias_V = _form(params, x_BTD, chunk, vocabulary, softcap, objective, numerics, constrain)
    return _chunked_loss(form, w, bias_V, *(form.pad(x) for x in (x_BTD, targets_BT, weights_BT)))


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
    tiles = _tiles(w.size, V) if groups == _shards(constrain, V, "vocab") == 1 else 1
    form = _Form(tied, vocabulary, softcap, objective, numerics, constrain, groups, chunks, tiles)
    return form, w, head.get("bias")


class _Losses(NamedTuple):
    """Of every token, [B, T], float32: nll, log Z, and the mean of -log p, which only smoothing asks for."""

    nll: Array
    log_z: Array
    uniform: Array | None


class _Objective(NamedTuple):
    """What is minimised besides nll; None: off."""

    z_loss: float | None = None
    smoothing: float | None = None

    def losses(self, logits_BTV: Array, targets_BT: Array, vocabulary: int) -> _Losses:
        nll_BT, log_z_BT = token_losses(logits_BTV, targets_BT)
        return self.of(logits_BTV, nll_BT, log_z_BT, vocabulary)

    def of(self, logits_BTV: Array, nll_BT: Array, log_z_BT: Array, vocabulary: int) -> _Losses:
        """The losses where nll and log Z are known."""
        smooth = self.smoothing is not None
        return _Losses(nll_BT, log_z_BT, uniform_nll(logits_BTV, log_z_BT, vocabulary=vocabulary) if smooth else None)

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
    tiles: int  # of the matrix, on a CPU

    def matrix(self, w: Array) -> Array:
        """w in the compute dtype, whole in its D: cast and gathered once, not once a chunk."""
        axes = ("vocab", "width") if self.tied else ("width", "vocab")
        return self.constrain(w.astype(self.numerics.dtype), axes)

    @property
    def vocabulary_axis(self) -> int:
        return 0 if self.tied else 1

    def tile(self, w: Array, tile: Array) -> Array:
        """One of `tiles` parts of w, in the compute dtype."""
        return _tile(w, tile, self.tiles, self.vocabulary_axis).astype(self.numerics.dtype)

    def product(self, matrix: Array, x_GMK: Array, *, back: bool = False) -> Array:
        """x · matrix, [G, M, V], float32; or `back`, of a gradient of that, [G, M, D]."""
        w_G = jnp.broadcast_to(matrix[None], (self.groups, *matrix.shape))
        return product(x_GMK, w_G, self.tied != back, self.numerics)

    def finish(self, logits_GMV: Array, bias_V: Array | None) -> Array:
        """The logits of what `product` gives of the whole matrix."""
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

    def join(self, chunks_GM: Array, rows: int) -> Array:
        """Chunks [chunks, G, M, ...] to [B, T, ...]."""
        parts = chunks_GM.reshape(self.chunks, rows, -1, *chunks_GM.shape[3:])
        return parts.swapaxes(0, 1).reshape(rows, -1, *chunks_GM.shape[3:])


def _losses(form: _Form, w: Array, bias_V: Array | None, x_BTD: Array, targets_BT: Array) -> _Losses:
    matrix = form.matrix(w)

    @jax.checkpoint
    def one(chunk: Array) -> _Losses:
        logits_GMV = form.finish(form.product(matrix, form.cut(x_BTD, chunk)), bias_V)
        return form.objective.losses(logits_GMV, form.cut(targets_BT, chunk), form.vocabulary)

    return jax.tree.map(lambda part: form.join(part, x_BTD.shape[0]), lax.map(one, jnp.arange(form.chunks)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_loss(
    form: _Form, w: Array, bias_V: Array | None, x_BTD: Array, targets_BT: Array, weights_BT: Array
) -> tuple[Array, Array]:
    return form.objective.sums(_losses(form, w, bias_V, x_BTD, targets_BT), weights_BT)


def _forward(
    form: _Form, w: Array, bias_V: Array | None, x_BTD: Array, targets_BT: Array, weights_BT: Array
) -> tuple[tuple[Array, Array], tuple[Array, Array | None, Array]]:
    """The sums, and the gradients of the objective: of the matrix, the bias and x."""
    matrix = form.matrix(w)

    def add(sums: tuple[Array, Array | None], chunk: Array) -> tuple[tuple[Array, Array | None], tuple]:
        x_GMD, targets_GM, weights_GM = (form.cut(v, chunk) for v in (x_BTD, targets_BT, weights_BT))
        logits_GMV, losses_GM = _logits(form, w, matrix, bias_V, x_GMD, targets_GM)
        d_GMV = _logits_gradient(form, logits_GMV, targets_GM, losses_GM.log_z, weights_GM)
        dw_G, db_GV = sums
        dx_GMD, dw_G = _gradient_products(form, w, matrix, x_GMD, d_GMV, dw_G)
        dw_G = _place(form, dw_G)
        db_GV = None if db_GV is None else db_GV + jnp.sum(d_GMV, axis=1)
        return (dw_G, db_GV), (losses_GM, dx_GMD.astype(x_BTD.dtype))

    # A sum a group: each device adds up its own rows, and the devices are summed once, after the last chunk.
    dw_G = _place(form, jnp.zeros((form.groups, *w.shape), jnp.float32))
    db_GV = None if bias_V is None else jnp.zeros((form.groups, *bias_V.shape), jnp.float32)
    (dw_G, db_GV), parts = lax.scan(add, (dw_G, db_GV), jnp.arange(form.chunks))
    losses_BT, dx_BTD = jax.tree.map(lambda part: form.join(part, x_BTD.shape[0]), parts)
    db_V = None if db_GV is None or bias_V is None else db_GV.sum(0).astype(bias_V.dtype)
    gradients = dw_G.sum(0).astype(w.dtype), db_V, dx_BTD
    return form.objective.sums(losses_BT, weights_BT), gradients


def _backward(
    form: _Form, gradients: tuple[Array, Array | None, Array], cotangents: tuple[Array, Array]
) -> tuple[Array, Array | None, Array, None, None]:
    g, _ = cotangents  # of the objective: in training 1, which the compiler leaves out
    dw, db_V, dx_BTD = jax.tree.map(lambda gradient: (g * gradient).astype(gradient.dtype), gradients)
    return dw, db_V, dx_BTD, None, None


_chunked_loss.defvjp(_forward, _backward)


def _logits_gradient(form: _Form, logits_GMV: Array, targets_GM: Array, log_z_GM: Array, weights_GM: Array) -> Array:
    """The gradient of a head's product, before bias and cap.

    Of nll it is softmax(logits) - onehot(target), with smoothing softmax(logits) - (1 - ε) onehot(target) - ε / V; of
    log² Z 2 log Z · softmax; the cap has the slope 1 - tanh².
    """
    ids_GMV = token_ids(logits_GMV)
    softmax_GMV = jnp.exp(logits_GMV - log_z_GM[:, :, None])
    z_loss, smoothing = form.objective
    if z_loss is not None:
        softmax_GMV = softmax_GMV * (1.0 + 2.0 * z_loss * log_z_GM)[:, :, None]
    target_GMV = ids_GMV == targets_GM[:, :, None]
    if smoothing is not None:
        uniform_GMV = jnp.where(ids_GMV < form.vocabulary, smoothing / form.vocabulary, 0.0)
        target_GMV = (1.0 - smoothing) * target_GMV + uniform_GMV
    d_GMV = (softmax_GMV - target_GMV) * weights_GM[:, :, None]
    if form.softcap is not None:
        slope_GMV = 1.0 - jnp.square(logits_GMV / form.softcap)
        d_GMV = jnp.where(ids_GMV < form.vocabulary, d_GMV * slope_GMV, 0.0)  # -inf past the vocabulary
    return d_GMV


def _logits(
    form: _Form, w: Array, matrix: Array, bias_V: Array | None, x_GMD: Array, targets_GM: Array
) -> tuple[Array, _Losses]:
    """The logits of a chunk, [G, M, V], float32, and the losses of its tokens. matrix: w as `form.matrix` has it."""

    def whole(matrix: Array) -> tuple[Array, _Losses]:
        logits_GMV = form.finish(form.product(matrix, x_GMD), bias_V)
        return logits_GMV, form.objective.losses(logits_GMV, targets_GM, form.vocabulary)

    def tiled(w: Array) -> tuple[Array, _Losses]:
        """log Z as it grows. A gather of the targets' logits: nothing is split, and a sum would be written down."""
        V = w.shape[form.vocabulary_axis]
        width = V // form.tiles

        def one(tile: Array, found: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            logits_GMV, most_GM1, sums_GM1 = found
            own_GMv = finish_logits(
                form.product(form.tile(w, tile), x_GMD),
                None if bias_V is None else _tile(bias_V, tile, form.tiles, axis=0),
                vocabulary=form.vocabulary if form.vocabulary == V else form.vocabulary - tile * width,
                softcap=form.softcap,
            )
            more_GM1 = jnp.maximum(most_GM1, jnp.max(own_GMv, axis=-1, keepdims=True))
            sums_GM1 = sums_GM1 * jnp.exp(most_GM1 - more_GM1)
            sums_GM1 += jnp.sum(jnp.exp(own_GMv - more_GM1), axis=-1, keepdims=True)
            return _with_tile(logits_GMV, own_GMv, tile, axis=2), more_GM1, sums_GM1

        empty_GM1 = jnp.zeros((*x_GMD.shape[:2], 1), jnp.float32)
        start = (jnp.zeros((*x_GMD.shape[:2], V), jnp.float32), empty_GM1 - jnp.inf, empty_GM1)
        logits_GMV, most_GM1, sums_GM1 = lax.fori_loop(0, form.tiles, one, start)
        log_z_GM = (most_GM1 + jnp.log(sums_GM1))[:, :, 0]
        targets_GM1 = targets_GM[:, :, None]
        nll_GM = log_z_GM - jnp.take_along_axis(logits_GMV, targets_GM1, axis=-1, mode="clip")[:, :, 0]
        return logits_GMV, form.objective.of(logits_GMV, nll_GM, log_z_GM, form.vocabulary)

    return _by_tiles(form, tiled, whole, w, matrix)


def _gradient_products(
    form: _Form, w: Array, matrix: Array, x_GMD: Array, d_GMV: Array, dw_G: Array
) -> tuple[Array, Array]:
    """Of a chunk with the gradient d of its logits: dx, [G, M, D], and dw_G with its own added; float32."""

    def of(matrix: Array, d_GMV: Array, dw_G: Array) -> tuple[Array, Array]:
        left, right = (d_GMV, x_GMD) if form.tied else (x_GMD, d_GMV)
        return form.product(matrix, d_GMV, back=True), dw_G + sum_of_rows(left, right, form.numerics)

    def whole(matrix: Array) -> tuple[Array, Array]:
        return of(matrix, d_GMV, dw_G)

    def tiled(w: Array) -> tuple[Array, Array]:
        axis, narrow = form.vocabulary_axis + 1, form.numerics.dtype == "bfloat16"
        # As whole numbers: XLA's CPU compiler would hold it in float32, to cut it.
        held = lax.bitcast_convert_type(d_GMV.astype(jnp.bfloat16), jnp.uint16) if narrow else d_GMV

        def one(tile: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            dx_GMD, dw_G = sums
            d_GMv = _tile(held, tile, form.tiles, axis=2)
            d_GMv = lax.bitcast_convert_type(d_GMv, jnp.bfloat16) if narrow else d_GMv
            more_GMD, own_G = of(form.tile(w, tile), d_GMv, _tile(dw_G, tile, form.tiles, axis))
            return dx_GMD + more_GMD, _with_tile(dw_G, own_G, tile, axis)

        return lax.fori_loop(0, form.tiles, one, (jnp.zeros(x_GMD.shape, jnp.float32), dw_G))

    return _by_tiles(form, tiled, whole, w, matrix)


def _by_tiles(
    form: _Form, tiled: Callable[[Array], Any], whole: Callable[[Array], Any], w: Array, matrix: Array
) -> Any:
    """`tiled` of w, on a CPU and where there is more than one tile; else `whole` of w as `form.matrix` has it."""
    if form.tiles == 1:
        return whole(matrix)
    return lax.platform_dependent(w, matrix, cpu=lambda w, matrix: tiled(w), default=lambda w, matrix: whole(matrix))


def _tile(x: Array, tile: Array, tiles: int, axis: int) -> Array:
    """One of `tiles` equal parts of an axis."""
    width = x.shape[axis] // tiles
    return lax.dynamic_slice_in_dim(x, tile * width, width, axis)


def _with_tile(x: Array, own: Array, tile: Array, axis: int) -> Array:
    """x with one of these parts replaced."""
    return lax.dynamic_update_slice_in_dim(x, own, tile * own.shape[axis], axis)


def _place(form: _Form, w_G: Array) -> Array:
    return form.constrain(w_G, ("batch", "vocab", "width") if form.tied else ("batch", "width", "vocab"))
