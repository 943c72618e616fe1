"""Head, loss and gradients of a large vocabulary on a CPU, a tile of the head's matrix after another.

No product needs a copy of the matrix in the compute dtype, or something of its size to be added to its gradient, and
nothing is computed twice. What is held of the logits is exponentials in the compute dtype: 2 M V bytes of bfloat16, 103
MB for 1024 positions of GPT-2.

Shapes: M positions, D model width, V vocabulary rows, t tiles, v = V / t rows of the vocabulary in a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lm.nn.head import entries, finish_logits, with_entries
from lm.nn.matmul import LANES, Numerics, product, sum_of_rows

Array = jax.Array

LEAST_TILE = 2**21
"""Numbers of the matrix in a tile, at least."""
MOST_TILES = 16
TILE_POSITIONS = 1024
"""M, or one of each row where there are more rows: of more positions a tile's arrays would leave the caches."""


def tile_count(size: int, vocabulary_rows: int, dtype: str) -> int:
    """t of a matrix of so many numbers, in that compute dtype; 1: its logits had better be held as they are, as always
    in float32."""
    tiles = 1
    while 2 * tiles <= MOST_TILES and vocabulary_rows % (2 * tiles * LANES) == 0 and size >= 2 * tiles * LEAST_TILE:
        tiles *= 2
    return tiles if dtype == "bfloat16" else 1


class TiledLoss(NamedTuple):
    """All float32.

    log_z_M, logit_M: log Z and the target's logit of each position. dw: the gradient of the objective by the matrix, as
    it lies, added to what was given. dx_MD: that by x.
    """

    log_z_M: Array
    logit_M: Array
    dw: Array
    dx_MD: Array


class _Found(NamedTuple):
    """Over the tiles so far, float32: the greatest logit, Σ exp beside it, the target's logit, and the sum over all ids
    but the target of the exponential, times the cap's slope, times the id's row of the matrix."""

    most_M1: Array
    sums_M1: Array
    logit_M: Array
    others_MD: Array


def tiled_loss(
    w: Array,
    x_MD: Array,
    targets_M: Array,
    weights_M: Array,
    dw: Array,
    *,
    fresh: bool,
    tied: bool,
    tiles: int,
    vocabulary: int,
    softcap: float | None,
    z_loss: float | None,
    numerics: Numerics,
) -> TiledLoss:
    """Losses and gradients of Σ weight · (nll + z_loss · log² Z), as `lm.nn.chunked_nll.head_loss` defines it.

    The gradient of a logit before its cap is rate · e^(logit - log Z), less weight at the target's, times the cap's
    slope, with rate = weight · (1 + 2 z_loss log Z). log Z is known only after the last tile: until then exponentials
    are shifted by the greatest logit so far. A later shift is a factor of a row, which the gradient of x takes as it
    grows, as attention in blocks does (Dao et al. 2022, arXiv:2205.14135), and the gradient of the matrix by way of x.
    The target's entry is left out of the products and added to both gradients in float32: rounded apart, its two terms
    would lose a sure prediction's.

    Args:
      w: [V, D] if `tied`, else [D, V], float32.
      x_MD: what the head reads, of any dtype.
      targets_M: ids below `vocabulary`, which may be less than V.
      weights_M: float32.
      dw: what to add the matrix's gradient to, as w; `fresh`: it is zeros, and isn't read.
      tiles: t, which divides V.
      softcap, z_loss: None: off.
    """
    axis = 0 if tied else 1
    V, width, rows = w.shape[axis], w.shape[axis] // tiles, x_MD.shape[0]
    x_MD = x_MD.astype(numerics.dtype)

    def part(x: Array, tile: Array) -> Array:
        return lax.dynamic_slice_in_dim(x, tile * width, width, axis)

    def slope(logits: Array) -> Array | float:
        """Of the cap."""
        return 1.0 if softcap is None else 1.0 - jnp.square(logits / softcap)

    def forward(found: _Found, tile: Array) -> tuple[_Found, tuple[Array, Array]]:
        """What is found with one more tile; its exponentials times the cap's slope, zeros at the targets, as bits of
        the compute dtype; and their shift."""
        most_M1, sums_M1, logit_M, others_MD = found
        matrix = part(w, tile).astype(numerics.dtype)
        real = vocabulary - tile * width if vocabulary < V else V
        logits_Mv = finish_logits(product(x_MD, matrix, tied, numerics), None, vocabulary=real, softcap=softcap)
        more_M1 = jnp.maximum(most_M1, jnp.max(logits_Mv, axis=-1, keepdims=True))
        shrink_M1 = jnp.exp(most_M1 - more_M1)
        e_Mv = jnp.exp(logits_Mv - more_M1)
        sums_M1 = sums_M1 * shrink_M1 + jnp.sum(e_Mv, axis=-1, keepdims=True)
        at_M = targets_M - tile * width
        logit_M = jnp.where((at_M >= 0) & (at_M < width), entries(logits_Mv, at_M), logit_M)
        d_Mv = e_Mv if softcap is None else jnp.where(e_Mv > 0, e_Mv * slope(logits_Mv), 0.0)  # -inf past `vocabulary`
        others_Mv = with_entries(d_Mv.astype(numerics.dtype), jnp.zeros(rows, numerics.dtype), at_M)
        others_MD = others_MD * shrink_M1 + product(others_Mv, matrix, not tied, numerics)
        # As whole numbers: JAX 0.10 would make a float32 copy of all that is held to put bfloat16 in.
        held_Mv = lax.bitcast_convert_type(others_Mv, f"uint{8 * others_Mv.itemsize}")
        return _Found(more_M1, sums_M1, logit_M, others_MD), (held_Mv, more_M1)

    zeros_M1 = jnp.zeros((rows, 1), jnp.float32)
    start = _Found(zeros_M1 - jnp.inf, zeros_M1, zeros_M1[:, 0], jnp.zeros(x_MD.shape, jnp.float32))
    (most_M1, sums_M1, logit_M, others_MD), held_t = lax.scan(forward, start, jnp.arange(tiles))

    log_z_M = most_M1[:, 0] + jnp.log(sums_M1[:, 0])
    rate_M = weights_M if z_loss is None else weights_M * (1.0 + 2.0 * z_loss * log_z_M)
    own_M1 = ((rate_M * jnp.exp(logit_M - log_z_M) - weights_M) * slope(logit_M))[:, None]

    def rated(shift_M1: Array) -> Array:
        """What an exponential with that shift is to be multiplied by."""
        return rate_M[:, None] * jnp.exp(shift_M1 - log_z_M[:, None])

    def backward(dw: Array, held: tuple[Array, tuple[Array, Array]]) -> tuple[Array, None]:
        tile, (held_Mv, shift_M1) = held
        others_Mv = lax.bitcast_convert_type(held_Mv, numerics.dtype)
        rated_MD = rated(shift_M1) * x_MD.astype(jnp.float32)
        more = sum_of_rows(*((others_Mv, rated_MD) if tied else (rated_MD, others_Mv)), numerics)
        if not fresh:
            more += part(dw, tile)
        return lax.dynamic_update_slice_in_dim(dw, more, tile * width, axis), None

    dw, _ = lax.scan(backward, dw, (jnp.arange(tiles), held_t))
    own_x_MD = own_M1 * x_MD.astype(jnp.float32)
    dw = dw.at[targets_M].add(own_x_MD) if tied else dw.at[:, targets_M].add(own_x_MD.T)
    own_w_MD = (w[targets_M] if tied else w[:, targets_M].T).astype(numerics.dtype).astype(jnp.float32)
    return TiledLoss(log_z_M, logit_M, dw, rated(most_M1) * others_MD + own_M1 * own_w_MD)
