"""A stack from ids to what its reader gets: embedding, layers, final norm. A decoder is one, and an encoder.

Shapes: B batch, T position, D model width.
"""

from __future__ import annotations

import math
from typing import Any

import jax

from lm.config import ModelConfig
from lm.nn import params as declare
from lm.nn.attention import Attend, AttentionMask
from lm.nn.cache import KeyValueCache
from lm.nn.decoder import cross_specs
from lm.nn.embedding import embed, embedding_specs
from lm.nn.encoder import EMBEDDING, Between, Gather, encode, layer_specs
from lm.nn.initializers import initializers
from lm.nn.layers import Constrain, Dropout, drop
from lm.nn.matmul import numerics
from lm.nn.norms import norm, norm_specs
from lm.nn.relative import relative_bias, relative_spec

Array = jax.Array


def stack_specs(cfg: ModelConfig) -> dict[str, Any]:
    """The declaration of a stack; of an encoder–decoder that of its decoder."""
    table = initializers(cfg).table
    position_rows = cfg.position_rows if cfg.positions == "learned" else None
    layer = {**layer_specs(cfg), **(cross_specs(cfg) if cfg.has_encoder else {})}
    specs: dict[str, Any] = {
        "embed": embedding_specs(cfg.padded_vocabulary, cfg.d_model, position_rows=position_rows, init=table),
        "layers": declare.stack(layer, cfg.num_layers),
    }
    if cfg.positions == "relative":
        specs["relative"] = relative_spec(cfg.relative_buckets, cfg.num_heads, init=table)
    if cfg.norm_position != "post":
        specs["norm"] = norm_specs(cfg.d_model, kind=cfg.norm, bias=cfg.bias, offset=cfg.norm_offset)
    return specs


def run_stack(
    params: dict[str, Any],
    tokens_BT: Array,
    positions_BT: Array,
    mask: AttentionMask,
    *,
    cfg: ModelConfig,
    dropout: Dropout | None,
    constrain: Constrain,
    attend: Attend,
    cache: KeyValueCache | None = None,
    gather: Gather | None = None,
    between: Between | None = None,
) -> tuple[Array, KeyValueCache | None]:
    """x_BTD in the compute dtype, and the cache with the keys and values of these tokens.

    Args:
      params: the tree declared by `stack_specs(cfg)`; more is not read.
      mask: of self-attention, but for the windows, which are the layers' own.
      cache: what is seen before these tokens; None: nothing, and nothing is kept.
      gather, between: as for `lm.nn.encoder.encode`.
    """
    x_BTD = embed(
        params["embed"],
        tokens_BT,
        positions_BT,
        scale=math.sqrt(cfg.d_model) if cfg.embedding_scale else None,
        sinusoids=cfg.positions == "sinusoidal",
    ).astype(numerics(cfg.compute_dtype).dtype)
    x_BTD = drop(x_BTD, None if dropout is None else dropout.at(cfg.num_layers, EMBEDDING))
    x_BTD = constrain(x_BTD, ("batch", "length", "width"))
    queries = tokens_BT.shape[1]
    x_BTD, cache = encode(
        params["layers"],
        x_BTD,
        positions_BT,
        mask,
        cache,
        cfg=cfg,
        dropout=dropout,
        constrain=constrain,
        attend=attend,
        gather=gather,
        bias_NTS=_bias(params, mask, queries, _keys(queries, cache), cfg),
        between=between,
    )
    if cfg.norm_position != "post":
        x_BTD = norm(params["norm"], x_BTD, kind=cfg.norm, epsilon=cfg.norm_epsilon, offset=cfg.norm_offset)
    return x_BTD, cache


def _keys(queries: int, cache: KeyValueCache | None) -> int:
    return queries if cache is None or cache.known_empty else cache.segments_BS.shape[1]


def _bias(params: dict[str, Any], mask: AttentionMask, queries: int, keys: int, cfg: ModelConfig) -> Array | None:
    if cfg.positions != "relative":
        return None
    return relative_bias(
        params["relative"],
        queries,
        keys,
        offset=mask.query_offset,
        bidirectional=not mask.causal,
        max_distance=cfg.relative_max_distance,
    )
