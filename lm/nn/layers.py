"""Positions, dropout and the feed-forward block.

Shapes: B batch, T position, D model width, N heads, H head width, F feed-forward width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lm.config import GATED
from lm.nn.activations import ACTIVATIONS
from lm.nn.matmul import Numerics, project
from lm.nn.params import ParamSpec

Array = jax.Array
Constrain = Callable[[Array, tuple[str, ...]], Array]


class Dropout(NamedTuple):
    """A rate in (0, 1) and one PRNG key a row of the batch, so that a row's mask doesn't depend on its company."""

    rate: float
    keys_B: Array

    def at(self, *place: Array | int) -> Dropout:
        """The same for one place in the model: every number (layer, site) is folded into each row's key."""
        keys_B = self.keys_B
        for number in place:
            keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, number)
        return Dropout(self.rate, keys_B)


def drop(x: Array, dropout: Dropout | None) -> Array:
    """Zeroes entries of x [B, ...] at the rate, scales the rest by 1 / (1 - rate) (Srivastava et al. 2014)."""
    if dropout is None:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - dropout.rate, x.shape[1:]))(dropout.keys_B)
    return jnp.where(keep, x / (1.0 - dropout.rate), 0).astype(x.dtype)


def rotary_frequencies(head_width: int, *, base: float) -> Array:
    """base^(-2h/H) radians a token for h < H/2, float32 (Su et al. 2021, arXiv:2104.09864, section 3.4.3)."""
    half = head_width // 2
    return base ** (-jnp.arange(half, dtype=jnp.float32) / half)


def llama3_frequencies(frequency_h: Array, *, factor: float, low: float, high: float, original_positions: int) -> Array:
    """Rotary frequencies for `factor` times the context a model was trained on (Llama 3.1, as its checkpoints have it).

    A wavelength above original_positions / low is stretched by `factor`, one below original_positions / high is kept;
    between the two the frequency goes linearly from one to the other with the turns in original_positions.
    """
    turns_h = original_positions * frequency_h / (2 * math.pi)
    kept_h = jnp.clip((turns_h - low) / (high - low), 0.0, 1.0)
    return kept_h * frequency_h + (1.0 - kept_h) * (frequency_h / factor)


class RotaryTable(NamedTuple):
    """How far rotary positions turn each pair of dimensions of each token, [B, T, 1, H / 2], float32."""

    cos_BT1h: Array
    sin_BT1h: Array


def rotary_table(positions_BT: Array, frequency_h: Array) -> RotaryTable:
    """Cosine and sine of position · frequency_h, for all heads and all layers that turn alike."""
    # float32: at position 4096 a bfloat16 angle is off by up to 16 radians
    angle_BT1h = positions_BT[:, :, None, None].astype(jnp.float32) * frequency_h.reshape(1, 1, 1, -1)
    table = RotaryTable(jnp.cos(angle_BT1h), jnp.sin(angle_BT1h))
    return lax.platform_dependent(table, cpu=_kept, default=lambda table: table)


def _kept(table: RotaryTable) -> RotaryTable:
    """The same numbers, by a product with the identity, which XLA's CPU compiler fuses with nothing.

    It would compute cosine and sine again for every element of every head of every layer: a tenth of the time of a
    small model's training step, a fifth of its evaluation's. Its barriers against that are gone when it fuses.
    """
    one_hh = jnp.eye(table.cos_BT1h.shape[-1])
    return RotaryTable(*(jnp.matmul(x_BT1h, one_hh, precision=lax.Precision.HIGHEST) for x_BT1h in table))


def rotary(x_BTNH: Array, table: RotaryTable) -> Array:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864): turns dimensions (h, h + H/2) by position · frequency_h.

    The halves are paired, not the neighbours, as in Llama checkpoints.
    """
    cos, sin = table
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def sinusoidal(positions_BT: Array, width: int) -> Array:
    """Sinusoidal positions (Vaswani et al. 2017, section 3.5): sin and cos interleaved, [B, T, width], float32."""
    frequency_d = jnp.exp(jnp.arange(0, width, 2, dtype=jnp.float32) * (-math.log(10_000.0) / width))
    angle_BTd = positions_BT[:, :, None].astype(jnp.float32) * frequency_d.reshape(1, 1, -1)
    return jnp.stack([jnp.sin(angle_BTd), jnp.cos(angle_BTd)], axis=-1).reshape(*positions_BT.shape, width)


def feed_forward_specs(
    width: int, hidden: int, *, activation: str, bias: bool, init_in: Callable, init_out: Callable, init_bias: Callable
) -> dict[str, ParamSpec]:
    """`init_*` take the number of inputs of the matrix and give its initializer."""
    specs = {
        "up": ParamSpec((width, hidden), ("embed", "mlp"), init_in(width), inputs=1),
        "down": ParamSpec((hidden, width), ("mlp", "embed"), init_out(hidden), inputs=1),
    }
    if activation in GATED:
        specs["gate"] = ParamSpec((width, hidden), ("embed", "mlp"), init_in(width), inputs=1)
    if bias:
        specs["up_bias"] = ParamSpec((hidden,), ("mlp",), init_bias(width))
        specs["down_bias"] = ParamSpec((width,), ("norm",), init_bias(hidden))
        if activation in GATED:
            specs["gate_bias"] = ParamSpec((hidden,), ("mlp",), init_bias(width))
    return specs


def feed_forward(
    params: dict[str, Any],
    x_BTD: Array,
    *,
    activation: str,
    numerics: Numerics,
    dropout: Dropout | None,
    constrain: Constrain,
) -> Array:
    """down(act(up(x))), or if gated down(act(gate(x)) · up(x)); `dropout` falls on the hidden units."""
    linear = functools.partial(project, inputs=1, numerics=numerics)
    hidden_BTF = linear(x_BTD, params["up"], params.get("up_bias"))
    if activation in GATED:
        gate_BTF = linear(x_BTD, params["gate"], params.get("gate_bias"))
        hidden_BTF = ACTIVATIONS[activation](gate_BTF) * hidden_BTF
    else:
        hidden_BTF = ACTIVATIONS[activation](hidden_BTF)
    hidden_BTF = drop(constrain(hidden_BTF, ("batch", "length", "mlp")), dropout)
    return linear(hidden_BTF, params["down"], params.get("down_bias"))
