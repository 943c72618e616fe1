"""The stack of encoder layers, as pure functions of its parameters.

Shapes: B batch, T position, D model width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.config import LayerKind, ModelConfig
from lm.nn.attention import Attend, AttentionMask
from lm.nn.cache import KeyValueCache
from lm.nn.initializers import initializers
from lm.nn.layers import (
    Constrain,
    Dropout,
    RotaryTable,
    drop,
    feed_forward,
    feed_forward_specs,
    llama3_frequencies,
    rotary_frequencies,
    rotary_table,
)
from lm.nn.matmul import numerics
from lm.nn.norms import norm, norm_specs
from lm.nn.params import Specs
from lm.nn.self_attention import self_attention, self_attention_specs

Array = jax.Array
Gather = Callable[[Any, Specs], Any]
"""Parameters that are split over devices, and their declaration -> the whole ones."""
EMBEDDING, PROBABILITIES, ATTENTION, HIDDEN, FEED_FORWARD, BETWEEN_PROBABILITIES, BETWEEN = range(7)
"""The sites of dropout."""


class Between(NamedTuple):
    """A block between a layer's self-attention and its feed-forward.

    name: of its parameters in those of a layer. specs: what it adds to the declaration of a layer, norms included.
    run: (its parameters, x_BTD, index of the layer, dropout on probabilities) -> y_BTD.
    """

    name: str
    specs: Specs
    run: Callable[[dict[str, Any], Array, Array | int, Dropout | None], Array]


def layer_specs(cfg: ModelConfig) -> dict[str, Any]:
    """The declaration of one layer."""
    init = initializers(cfg)
    return {
        **block_norms("attention", cfg),
        **block_norms("feed_forward", cfg),
        "attention": self_attention_specs(
            cfg.d_model,
            heads=cfg.num_heads,
            kv_heads=cfg.kv_heads,
            head_width=cfg.head_width,
            qkv_bias=cfg.has_qkv_bias,
            out_bias=cfg.bias,
            qk_norm=cfg.qk_norm,
            norm_offset=cfg.norm_offset,
            init_qkv=init.qkv,
            init_out=init.out,
        ),
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


def block_norms(block: str, cfg: ModelConfig) -> dict[str, Any]:
    """The declaration of the norms around one block of a layer."""
    names = [f"{block}_norm", f"{block}_output_norm"] if cfg.norm_position == "both" else [f"{block}_norm"]
    return dict.fromkeys(names, norm_specs(cfg.d_model, kind=cfg.norm, bias=cfg.bias, offset=cfg.norm_offset))


def encode(
    layers: dict[str, Any] | Sequence[dict[str, Any]],
    x_BTD: Array,
    positions_BT: Array,
    mask: AttentionMask,
    cache: KeyValueCache | None,
    *,
    cfg: ModelConfig,
    dropout: Dropout | None,
    constrain: Constrain,
    attend: Attend,
    gather: Gather | None = None,
    bias_NTS: Array | None = None,
    between: Between | None = None,
) -> tuple[Array, KeyValueCache | None]:
    """The stack: every layer in turn over parameters stacked as [L, ...], by scan or unrolled, to the same numbers.

    The scan runs over whole repetitions of the pattern of layers; those that are left over follow unrolled. With a
    cache, or parameters that are a sequence of those of each layer, all are unrolled.

    Args:
      gather: makes the parameters of a layer whole, while it runs and again in the backward pass: about one layer is
        whole at a time. None: they are.
      bias_NTS: added to the scores of every layer's self-attention.
      between: one more block of every layer.
    """
    pattern = cfg.layer_pattern
    P, L = len(pattern), cfg.num_layers
    specs = {**layer_specs(cfg), **({} if between is None else between.specs)}
    tables = rotary_tables(cfg, positions_BT)

    def run_layer(carry: tuple, layer: tuple, kind: LayerKind) -> tuple:
        x, cache = carry
        parameters, index = layer
        return encoder_layer(
            parameters if gather is None else gather(parameters, specs),
            x,
            mask,
            cache,
            index,
            kind=kind,
            table=tables.get(kind),
            cfg=cfg,
            dropout=dropout,
            constrain=constrain,
            attend=attend,
            bias_NTS=bias_NTS,
            between=between,
        )

    if cfg.remat and cache is None:
        run_layer = jax.checkpoint(run_layer, static_argnums=2)
    elif gather is not None:
        # Inside a scan, forward and backward pass are loops of their own: nothing in one is merged with the other.
        apart = not cfg.scan_layers
        run_layer = jax.checkpoint(run_layer, static_argnums=2, prevent_cse=apart, policy=_all_but_gathered)

    def run_pattern(carry: tuple, group: tuple) -> tuple[tuple, None]:
        for place, kind in enumerate(pattern):
            carry = run_layer(carry, _at(group, place), kind)
        return carry, None

    carry = (x_BTD, cache)
    if not isinstance(layers, dict):
        for index, layer in enumerate(layers):
            carry = run_layer(carry, (layer, index), pattern[index % P])
        return carry
    every = (layers, jnp.arange(L))
    scanned = L - L % P if cfg.scan_layers and cache is None else 0
    if scanned and P == 1:  # as it lies: groups of one would be copied
        carry, _ = jax.lax.scan(lambda carry, layer: (run_layer(carry, layer, pattern[0]), None), carry, every)
    elif scanned:
        whole = every if scanned == L else jax.tree.map(lambda stacked: stacked[:scanned], every)
        groups = jax.tree.map(lambda stacked: stacked.reshape(-1, P, *stacked.shape[1:]), whole)
        carry, _ = jax.lax.scan(run_pattern, carry, groups)
    left = jax.tree.map(lambda stacked: stacked[scanned:], layers) if scanned else layers
    for index, layer in enumerate(_unstacked(left, L - scanned), scanned):
        carry = run_layer(carry, (layer, index), pattern[index % P])
    return carry


def _all_but_gathered(primitive: Any, *operands: Any, **parameters: Any) -> bool:
    """What a layer keeps for its backward pass: all that it would anyway, but what is gathered.

    Nor what costs nothing to make of something kept, since whole parameters would be kept in another form: shapes
    changed, and values widened, as from bfloat16 to float32.
    """
    if primitive.name == "convert_element_type":
        return jnp.dtype(parameters["new_dtype"]).itemsize <= operands[0].dtype.itemsize
    return primitive.name not in ("all_gather", "reshape", "squeeze")


def encoder_layer(
    params: dict[str, Any],
    x_BTD: Array,
    mask: AttentionMask,
    cache: KeyValueCache | None,
    layer: Array | int,
    *,
    kind: LayerKind,
    table: RotaryTable | None,
    cfg: ModelConfig,
    dropout: Dropout | None,
    constrain: Constrain,
    attend: Attend,
    bias_NTS: Array | None = None,
    between: Between | None = None,
) -> tuple[Array, KeyValueCache | None]:
    """Self-attention, what is between, and feed-forward, each added to the residual stream; `layer` is its index in the
    stack.

    Pre-norm: x + block(norm(x)) (Xiong et al. 2020). Post-norm: norm(x + block(x)) (Vaswani et al. 2017). Both:
    x + norm(block(norm(x))) (Gemma 2, arXiv:2408.00118).
    """
    post, both = cfg.norm_position == "post", cfg.norm_position == "both"

    def site(number: int) -> Dropout | None:
        return None if dropout is None else dropout.at(layer, number)

    def normalize(name: str, x: Array) -> Array:
        return norm(params[name], x, kind=cfg.norm, epsilon=cfg.norm_epsilon, offset=cfg.norm_offset)

    def add(block: str, x_BTD: Array, y_BTD: Array, number: int) -> Array:
        y_BTD = normalize(f"{block}_output_norm", y_BTD) if both else y_BTD
        sum_BTD = constrain(x_BTD + drop(y_BTD, site(number)), ("batch", "length", "width"))
        return normalize(f"{block}_norm", sum_BTD) if post else sum_BTD

    y_BTD, cache = self_attention(
        params["attention"],
        x_BTD if post else normalize("attention_norm", x_BTD),
        mask._replace(window=kind.window),
        head_width=cfg.head_width,
        table=table,
        scale=cfg.score_scale,
        softcap=cfg.attention_softcap,
        norm_epsilon=cfg.norm_epsilon,
        norm_offset=cfg.norm_offset,
        numerics=numerics(cfg.compute_dtype),
        dropout=site(PROBABILITIES),
        constrain=constrain,
        attend=attend,
        cache=cache,
        layer=layer,
        bias_NTS=bias_NTS,
    )
    x_BTD = add("attention", x_BTD, y_BTD, ATTENTION)
    if between is not None:
        own_BTD = x_BTD if post else normalize(f"{between.name}_norm", x_BTD)
        y_BTD = between.run(params[between.name], own_BTD, layer, site(BETWEEN_PROBABILITIES))
        x_BTD = add(between.name, x_BTD, y_BTD, BETWEEN)
    y_BTD = feed_forward(
        params["feed_forward"],
        x_BTD if post else normalize("feed_forward_norm", x_BTD),
        activation=cfg.activation,
        numerics=numerics(cfg.compute_dtype),
        dropout=site(HIDDEN) if cfg.hidden_dropout else None,
        constrain=constrain,
    )
    return add("feed_forward", x_BTD, y_BTD, FEED_FORWARD), cache


def rotary_tables(cfg: ModelConfig, positions_BT: Array) -> dict[LayerKind, RotaryTable]:
    """The table of each kind of layer, one for all that turn alike; none without rotary positions."""
    if cfg.positions != "rotary":
        return {}
    found: dict[tuple[float, float], RotaryTable] = {}
    for kind in cfg.layer_pattern:
        alike = (kind.rotary_base, kind.rotary_factor)
        if alike not in found:
            found[alike] = rotary_table(positions_BT, _frequencies(cfg, kind))
    return {kind: found[kind.rotary_base, kind.rotary_factor] for kind in cfg.layer_pattern}


def _frequencies(cfg: ModelConfig, kind: LayerKind) -> Array:
    """Radians a token that rotary positions turn by in one kind of layer, [H / 2], float32."""
    frequency_h = rotary_frequencies(cfg.head_width, base=kind.rotary_base)
    if cfg.rotary_scaling == "llama3":
        return llama3_frequencies(
            frequency_h,
            factor=kind.rotary_factor,
            low=cfg.rotary_low_frequency_factor,
            high=cfg.rotary_high_frequency_factor,
            original_positions=cfg.rotary_original_positions,
        )
    return frequency_h / kind.rotary_factor  # linear: Chen et al. 2023, arXiv:2306.15595


def _at(stacked: Any, index: int) -> Any:
    """One layer of a tree of stacked arrays."""
    return jax.tree.map(lambda array: array[index], stacked)


def _unstacked(stacked: Any, layers: int) -> list[Any]:
    """All layers of a tree of stacked arrays. Their gradients are joined once; those of `_at` would be padded each to
    the whole stack, and added."""
    if not layers:
        return []
    leaves, tree = jax.tree.flatten(stacked)
    pieces = [jax.lax.split(leaf, (1,) * layers, axis=0) for leaf in leaves]
    return [jax.tree.unflatten(tree, [piece[0] for piece in layer]) for layer in zip(*pieces, strict=True)]
