"""What makes a decoder of the stack of encoder layers: cross-attention, the block by which each layer reads a source.

Shapes: B batch, T position of targets, S position of the source, D model width, L layers, N query heads, K key/value
heads, H head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax

from lm.config import ModelConfig
from lm.nn import params as declare
from lm.nn.attention import Attend, AttentionMask
from lm.nn.encoder import Between, block_norms
from lm.nn.initializers import initializers
from lm.nn.layers import Constrain, Dropout
from lm.nn.matmul import numerics, project
from lm.nn.norms import rms_norm
from lm.nn.params import ParamSpec
from lm.nn.self_attention import head_norm_specs, output_specs

Array = jax.Array
NAME = "cross_attention"


class Memory(NamedTuple):
    """The keys and values of a source in every layer, and its segments: all that decoding needs of it.

    keys, values: of each layer, [B, K, S, H]: as the products of attention read them. Rows of targets may be a multiple
    of those of sources, several one after another for each: its beams read one memory.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    segments_BS: Array

    def read(self, layer: Array | int) -> tuple[Array, Array]:
        """Those of one layer, each [B, S, K, H]."""
        assert isinstance(layer, int), "a stack with a memory runs unrolled"
        return self.keys[layer].transpose(0, 2, 1, 3), self.values[layer].transpose(0, 2, 1, 3)


def cross_specs(cfg: ModelConfig) -> dict[str, Any]:
    """What cross-attention adds to the declaration of a layer."""
    N, K, H = cfg.num_heads, cfg.kv_heads, cfg.head_width
    init = initializers(cfg)
    drawn = init.qkv(cfg.d_model, (N + 2 * K) * H)  # as one matrix of queries, keys and values is
    specs: dict[str, Any] = {
        "q": ParamSpec((cfg.d_model, N, H), ("embed", "heads", "head"), drawn, inputs=1),
        "kv": ParamSpec((cfg.d_model, K, 2 * H), ("embed", "kv_heads", "kv"), drawn, inputs=1, pieces=(H, H)),
        **output_specs(cfg.d_model, heads=N, head_width=H, bias=cfg.bias, init=init.out),
    }
    if cfg.has_qkv_bias:
        specs["q_bias"] = ParamSpec((N, H), ("heads", "head"), declare.zeros)
        specs["kv_bias"] = ParamSpec((K, 2 * H), ("kv_heads", "kv"), declare.zeros)
    if cfg.qk_norm:
        specs |= head_norm_specs(H, offset=cfg.norm_offset)
    return {NAME: specs, **block_norms(NAME, cfg)}


def reading_states(
    memory_BSD: Array, segments_BS: Array, segments_BT: Array, *, cfg: ModelConfig, constrain: Constrain, attend: Attend
) -> Between:
    """Cross-attention to what an encoder has made of a source; each layer makes keys and values of it when it runs."""

    def keys_values(params: dict[str, Any], layer: Array | int) -> tuple[Array, Array]:
        return _keys_values(params, memory_BSD, cfg, constrain)

    return _reading(keys_values, segments_BS, segments_BT, cfg, constrain, attend)


def reading_memory(
    memory: Memory, segments_BT: Array, *, cfg: ModelConfig, constrain: Constrain, attend: Attend
) -> Between:
    """The same of keys and values that `remember` has made."""
    return _reading(lambda _, layer: memory.read(layer), memory.segments_BS, segments_BT, cfg, constrain, attend)


def remember(
    layers: dict[str, Any], memory_BSD: Array, segments_BS: Array, *, cfg: ModelConfig, constrain: Constrain
) -> Memory:
    """The keys and values of a source in every layer, in the compute dtype, made once.

    Args:
      layers: the parameters of the decoder's stack.
      memory_BSD: what the encoder has made of the source, see `lm.nn.language_model.encode_source`.
    """

    def of_layer(params: dict[str, Any]) -> tuple[Array, Array]:
        k_BSKH, v_BSKH = _keys_values(params, memory_BSD, cfg, constrain)
        return k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)

    keys_LBKSH, values_LBKSH = lax.map(of_layer, layers[NAME])
    return Memory(tuple(keys_LBKSH), tuple(values_LBKSH), segments_BS)


def _reading(
    keys_values: Callable[[dict[str, Any], Array | int], tuple[Array, Array]],
    segments_BS: Array,
    segments_BT: Array,
    cfg: ModelConfig,
    constrain: Constrain,
    attend: Attend,
) -> Between:
    """Queries of a layer's input, keys and values of the source; a query sees the source of its own segment alone.

    Vaswani et al. 2017, section 3.2.3. No positions enter: those of both sides are in what each stack has made.
    """
    queries = segments_BT.reshape(segments_BS.shape[0], -1)
    mask = AttentionMask(causal=False, query_segments_BT=queries, key_segments_BS=segments_BS)

    def run(params: dict[str, Any], x_BTD: Array, layer: Array | int, dropout: Dropout | None) -> Array:
        exact = numerics(cfg.compute_dtype)
        q_BTNH = project(x_BTD, params["q"], params.get("q_bias"), inputs=1, numerics=exact)
        q_BTNH = constrain(q_BTNH, ("batch", "length", "heads", "head"))
        k_BSKH, v_BSKH = keys_values(params, layer)
        # Of several rows that read one source all queries see it: they are as good as one row.
        several = q_BTNH.reshape(k_BSKH.shape[0], -1, *q_BTNH.shape[2:])
        o_BTNH = attend(
            _head_norm(params, "q_norm", several, cfg),
            k_BSKH,
            v_BSKH,
            mask,
            scale=cfg.score_scale,
            softcap=cfg.attention_softcap,
            numerics=exact,
            dropout=dropout,
        )
        o_BTNH = constrain(o_BTNH.reshape(q_BTNH.shape), ("batch", "length", "heads", "head"))
        return project(o_BTNH, params["out"], params.get("out_bias"), inputs=2, numerics=exact)

    return Between(NAME, cross_specs(cfg), run)


def _keys_values(
    params: dict[str, Any], memory_BSD: Array, cfg: ModelConfig, constrain: Constrain
) -> tuple[Array, Array]:
    exact = numerics(cfg.compute_dtype)
    kv_BSKe = project(memory_BSD, params["kv"], params.get("kv_bias"), inputs=1, numerics=exact)
    kv_BSKe = constrain(kv_BSKe, ("batch", "length", "kv_heads", "kv"))
    k_BSKH, v_BSKH = lax.split(kv_BSKe, (cfg.head_width,) * 2, axis=3)
    return _head_norm(params, "k_norm", k_BSKH, cfg), v_BSKH


def _head_norm(params: dict[str, Any], name: str, x_BTNH: Array, cfg: ModelConfig) -> Array:
    if name not in params:
        return x_BTNH
    return rms_norm(x_BTNH, params[name]["scale"], epsilon=cfg.norm_epsilon, offset=cfg.norm_offset)
