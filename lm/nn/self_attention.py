"""The self-attention block around a back end of `attend`.

Shapes: B batch, T query position, S key position, D model width, N query heads, K key/value heads, G = N / K queries a
key/value head, H head width, E = (G + 2) H.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lm.nn import params as declare
from lm.nn.attention import Attend, AttentionMask
from lm.nn.cache import KeyValueCache, Parts
from lm.nn.filled_attention import attend_filled
from lm.nn.layers import Constrain, Dropout, RotaryTable, rotary
from lm.nn.matmul import Numerics, project
from lm.nn.matmul import numerics as exactly
from lm.nn.norms import norm_specs, rms_norm
from lm.nn.params import ParamSpec

Array = jax.Array


def self_attention_specs(
    width: int,
    *,
    heads: int,
    kv_heads: int,
    head_width: int,
    qkv_bias: bool,
    out_bias: bool,
    qk_norm: bool,
    norm_offset: bool,
    init_qkv: Callable,
    init_out: Callable,
) -> dict[str, Any]:
    """`init_*` take the numbers of inputs and outputs of the matrix and give its initializer.

    Query, key and value are one matrix, a group of heads after another, so that splitting the key/value heads over
    devices keeps each group together.
    """
    group = (heads // kv_heads + 2) * head_width
    specs: dict[str, Any] = {
        "qkv": ParamSpec(
            (width, kv_heads, group),
            ("embed", "kv_heads", "qkv"),
            init_qkv(width, kv_heads * group),
            inputs=1,
            pieces=(group - 2 * head_width, head_width, head_width),
        ),
        **output_specs(width, heads=heads, head_width=head_width, bias=out_bias, init=init_out),
    }
    if qkv_bias:
        specs["qkv_bias"] = ParamSpec((kv_heads, group), ("kv_heads", "qkv"), declare.zeros)
    return {**specs, **(head_norm_specs(head_width, offset=norm_offset) if qk_norm else {})}


def output_specs(width: int, *, heads: int, head_width: int, bias: bool, init: Callable) -> dict[str, ParamSpec]:
    """The projection of all heads back to the width; `init` as in `self_attention_specs`."""
    inputs = heads * head_width
    specs = {"out": ParamSpec((heads, head_width, width), ("heads", "head", "embed"), init(inputs, width), inputs=2)}
    if bias:
        specs["out_bias"] = ParamSpec((width,), ("norm",), declare.zeros)
    return specs


def head_norm_specs(head_width: int, *, offset: bool) -> dict[str, Any]:
    """The norms of query and key heads."""
    return dict.fromkeys(("q_norm", "k_norm"), norm_specs(head_width, kind="rmsnorm", bias=False, offset=offset))


def self_attention(
    params: dict[str, Any],
    x_BTD: Array,
    mask: AttentionMask,
    *,
    head_width: int,
    table: RotaryTable | None,
    scale: float,
    softcap: float | None,
    norm_epsilon: float,
    norm_offset: bool,
    numerics: Numerics,
    dropout: Dropout | None,
    constrain: Constrain,
    attend: Attend,
    cache: KeyValueCache | None,
    layer: Array | int,
    bias_NTS: Array | None,
) -> tuple[Array, KeyValueCache | None]:
    """Projects x to queries, keys and values, attends, projects back to [B, T, D].

    `attend` is the back end. `table` says how far rotary positions turn; None: there are none. `scale`, `softcap` and
    `bias_NTS` are those of `attend`. With a cache, keys and values are appended to it (at `layer`) and the queries
    attend to all that it holds. The norms on queries and keys (Henry et al. 2020, arXiv:2010.04245) come before the
    rotation.
    """
    qkv_BTKE = project(x_BTD, params["qkv"], params.get("qkv_bias"), inputs=1, numerics=numerics)
    qkv_BTKE = constrain(qkv_BTKE, ("batch", "length", "kv_heads", "qkv"))
    q_BTNH, k_BTKH, v_BTKH = _heads(qkv_BTKE, head_width)
    if "q_norm" in params:
        q_BTNH = rms_norm(q_BTNH, params["q_norm"]["scale"], epsilon=norm_epsilon, offset=norm_offset)
        k_BTKH = rms_norm(k_BTKH, params["k_norm"]["scale"], epsilon=norm_epsilon, offset=norm_offset)
    if table is not None:
        q_BTNH, k_BTKH = rotary(q_BTNH, table), rotary(k_BTKH, table)
    keys: Parts = (k_BTKH,)
    values: Parts = (v_BTKH,)
    if cache is not None:
        assert isinstance(layer, int), "a stack with a cache runs unrolled"
        cache, keys, values, mask = cache.see(layer, k_BTKH, v_BTKH, mask)
    held = keys[0].dtype
    how: dict[str, Any] = {
        "scale": scale,
        "softcap": softcap,
        # As the cache holds it: to make it narrow would take longer than the products.
        "numerics": exactly(held.name) if held != k_BTKH.dtype else numerics,
        "dropout": dropout,
        "bias_NTS": bias_NTS,
    }
    if len(keys) == 1:
        o_BTNH = attend(q_BTNH, keys[0], values[0], mask, **how)
    else:
        o_BTNH = attend_filled(q_BTNH, keys, values, mask, **how)
    o_BTNH = constrain(o_BTNH, ("batch", "length", "heads", "head"))
    return project(o_BTNH, params["out"], params.get("out_bias"), inputs=2, numerics=numerics), cache


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _heads(qkv_BTKE: Array, head_width: int) -> tuple[Array, Array, Array]:
    """q_BTNH, k_BTKH, v_BTKH, taken apart; their gradients are put together in one pass, not padded and added."""
    B, T, K, E = qkv_BTKE.shape
    queries = E - 2 * head_width
    q_BTKe, k_BTKH, v_BTKH = jnp.split(qkv_BTKE, (queries, queries + head_width), axis=-1)
    return q_BTKe.reshape(B, T, K * queries // head_width, head_width), k_BTKH, v_BTKH


def _heads_backward(head_width: int, _: None, gradients: tuple[Array, Array, Array]) -> tuple[Array]:
    dq_BTNH, dk_BTKH, dv_BTKH = gradients
    return (jnp.concatenate([dq_BTNH.reshape(*dk_BTKH.shape[:3], -1), dk_BTKH, dv_BTKH], axis=-1),)


_heads.defvjp(lambda qkv_BTKE, head_width: (_heads(qkv_BTKE, head_width), None), _heads_backward)
