"""Token embeddings and absolute positions.

Shapes: B batch, T position, D model width, V vocabulary rows, P position rows.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lm.nn.layers import sinusoidal
from lm.nn.params import Initializer, ParamSpec

Array = jax.Array


def embedding_specs(
    vocabulary: int, width: int, *, position_rows: int | None, init: Initializer
) -> dict[str, ParamSpec]:
    """`position_rows`: rows of a learned position table, None for none."""
    specs = {"tokens": ParamSpec((vocabulary, width), ("vocab", "embed"), init, inputs=1)}
    if position_rows is not None:
        specs["positions"] = ParamSpec((position_rows, width), ("positions", "embed"), init, inputs=1)
    return specs


def embed(
    params: dict[str, Any], tokens_BT: Array, positions_BT: Array, *, scale: float | None, sinusoids: bool
) -> Array:
    """x_BTD, float32: the rows of the table, times `scale`, plus learned or sinusoidal positions where there are any.

    A position beyond the learned table reads its last row; callers refuse such rows first.
    """
    x_BTD = jnp.take(params["tokens"], tokens_BT, axis=0, mode="clip")
    if scale is not None:
        x_BTD = x_BTD * scale
    if "positions" in params:
        x_BTD = x_BTD + jnp.take(params["positions"], positions_BT, axis=0, mode="clip")
    if sinusoids:
        x_BTD = x_BTD + sinusoidal(positions_BT, x_BTD.shape[-1])
    return x_BTD
