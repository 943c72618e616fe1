"""The stack of encoder layers, as pure functions of its parameters.

Shapes: B batch, T position, D model width, L layers.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.config import ModelConfig
from lm.nn import params as declare
from lm.nn.attention import AttentionMask, self_attention, self_attention_specs
from lm.nn.cache import KeyValueCache
from lm.nn.layers import Constrain, Dropout, drop, feed_forward, feed_forward_specs, norm, norm_specs
from lm.nn.matmul import numerics

Array = jax.Array
EMBEDDING, PROBABILITIES, ATTENTION, HIDDEN, FEED_FORWARD = range(5)  # the sites of dropout


def layer_specs(cfg: ModelConfig) -> dict[str, Any]:
    """The declaration of one layer."""
    init = initializers(cfg)
    return {
        "attention_norm": norm_specs(cfg.d_model, kind=cfg.norm, bias=cfg.bias),
        "attention": self_attention_specs(
            cfg.d_model,
            heads=cfg.num_heads,
            kv_heads=cfg.kv_heads,
            head_width=cfg.head_width,
            bias=cfg.bias,
            qk_norm=cfg.qk_norm,
            init_qkv=init.qkv,
            init_out=init.out,
        ),
        "feed_forward_norm": norm_specs(cfg.d_model, kind=cfg.norm, bias=cfg.bias),
        "feed_forward": feed_forward_specs(
            cfg.d_model,
            cfg.ff_width,
            activation=cfg.activation,
            bias=cfg.bias,
            init_in=init.up,
            init_out=init.down,
            init_bias=init.bias,
        ),
    }


def encode(
    layers: dict[str, Any],
    x_BTD: Array,
    positions_BT: Array,
    mask: AttentionMask,
    cache: KeyValueCache | None,
    *,
    cfg: ModelConfig,
    dropout: Dropout | None,
    constrain: Constrain,
) -> tuple[Array, KeyValueCache | None]:
    """The stack: every layer in turn over parameters stacked as [L, ...], by scan or unrolled, to the same numbers."""

    def run_layer(carry: tuple, layer: tuple) -> tuple[tuple, None]:
        x, cache = carry
        parameters, index = layer
        x, cache = encoder_layer(
            parameters, x, positions_BT, mask, cache, index, cfg=cfg, dropout=dropout, constrain=constrain
        )
        return (x, cache), None

    if cfg.remat:
        run_layer = jax.checkpoint(run_layer)
    if cfg.scan_layers:
        return jax.lax.scan(run_layer, (x_BTD, cache), (layers, jnp.arange(cfg.num_layers)))[0]
    carry = (x_BTD, cache)
    for index in range(cfg.num_layers):
        carry, _ = run_layer(carry, (jax.tree.map(lambda stacked: stacked[index], layers), index))  # noqa: B023
    return carry


def encoder_layer(
    params: dict[str, Any],
    x_BTD: Array,
    positions_BT: Array,
    mask: AttentionMask,
    cache: KeyValueCache | None,
    layer: Array | int,
    *,
    cfg: ModelConfig,
    dropout: Dropout | None,
    constrain: Constrain,
) -> tuple[Array, KeyValueCache | None]:
    """Self-attention and feed-forward, each added to the residual stream; `layer` is its index in the stack.

    Pre-norm: x + block(norm(x)) (Xiong et al. 2020). Post-norm: norm(x + block(x)) (Vaswani et al. 2017).
    """
    pre = cfg.norm_position == "pre"

    def site(number: int) -> Dropout | None:
        return None if dropout is None else dropout.at(layer, number)

    def normalize(name: str, x: Array) -> Array:
        return norm(params[name], x, kind=cfg.norm, epsilon=cfg.norm_epsilon)

    y_BTD, cache = self_attention(
        params["attention"],
        normalize("attention_norm", x_BTD) if pre else x_BTD,
        positions_BT,
        mask,
        head_width=cfg.head_width,
        rotary_base=cfg.rotary_base if cfg.positions == "rotary" else None,
        norm_epsilon=cfg.norm_epsilon,
        numerics=numerics(cfg.compute_dtype),
        dropout=site(PROBABILITIES),
        constrain=constrain,
        cache=cache,
        layer=layer,
    )
    x_BTD = constrain(x_BTD + drop(y_BTD, site(ATTENTION)), ("batch", "length", "width"))
    if not pre:
        x_BTD = normalize("attention_norm", x_BTD)
    y_BTD = feed_forward(
        params["feed_forward"],
        normalize("feed_forward_norm", x_BTD) if pre else x_BTD,
        activation=cfg.activation,
        numerics=numerics(cfg.compute_dtype),
        dropout=site(HIDDEN) if cfg.hidden_dropout else None,
        constrain=constrain,
    )
    x_BTD = constrain(x_BTD + drop(y_BTD, site(FEED_FORWARD)), ("batch", "length", "width"))
    return (x_BTD if pre else normalize("feed_forward_norm", x_BTD)), cache


class Initializers(NamedTuple):
    """How each kind of parameter is drawn, by `model.initializer`."""

    table: Any
    qkv: Any  # (inputs, outputs) -> Initializer
    out: Any
    up: Any  # inputs -> Initializer
    down: Any
    bias: Any  # inputs of the matrix it goes with -> Initializer


def initializers(cfg: ModelConfig) -> Initializers:
    """The initializers of a config."""
    if cfg.initializer == "torch":  # the defaults of torch.nn.TransformerEncoderLayer; tables as the tutorial sets them
        linear = lambda inputs: declare.uniform(inputs**-0.5)  # noqa: E731
        xavier = lambda inputs, outputs: declare.uniform(math.sqrt(6 / (inputs + outputs)))  # noqa: E731
        return Initializers(declare.uniform(0.1), xavier, lambda inputs, _: linear(inputs), linear, linear, linear)
    plain = declare.normal(cfg.init_std)
    # Radford et al. 2019, section 2.3: the sum of 2L block outputs keeps its variance.
    scaled = declare.normal(cfg.init_std / math.sqrt(2 * cfg.num_layers))
    return Initializers(
        plain, lambda *_: plain, lambda *_: scaled, lambda _: plain, lambda _: scaled, lambda _: declare.zeros
    )
