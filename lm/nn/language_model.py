"""A decoder-only language model as pure functions of its parameters: embedding, causal stack of encoder layers, head.

Shapes: B batch, T position, D model width, V vocabulary rows.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from lm.config import ModelConfig
from lm.nn import params as declare
from lm.nn.attention import Attend, AttentionMask
from lm.nn.attention import attend as reference_attend
from lm.nn.attention_backend import unplaced
from lm.nn.cache import KeyValueCache
from lm.nn.chunked_nll import batch_shards, chunk_length, head_loss, head_nll
from lm.nn.embedding import embed, embedding_specs
from lm.nn.encoder import EMBEDDING, Gather, encode, initializers, layer_specs
from lm.nn.head import head_specs, lm_head
from lm.nn.layers import Constrain, Dropout, drop
from lm.nn.matmul import numerics
from lm.nn.norms import norm, norm_specs

Array = jax.Array


def unconstrained(x: Array, axes: tuple[str, ...]) -> Array:
    """The `constrain` of a single device: leaves x where it is."""
    return x


def model_specs(cfg: ModelConfig) -> dict[str, Any]:
    """The declaration of every parameter of a resolved config."""
    init = initializers(cfg)
    position_rows = cfg.position_rows if cfg.positions == "learned" else None
    specs: dict[str, Any] = {
        "embed": embedding_specs(cfg.padded_vocabulary, cfg.d_model, position_rows=position_rows, init=init.table),
        "layers": declare.stack(layer_specs(cfg), cfg.num_layers),
    }
    if cfg.norm_position != "post":
        specs["norm"] = norm_specs(cfg.d_model, kind=cfg.norm, bias=cfg.bias, offset=cfg.norm_offset)
    head = head_specs(cfg.d_model, cfg.padded_vocabulary, tied=cfg.tie_embeddings, bias=cfg.head_bias, init=init.table)
    if head:
        specs["head"] = head
    return specs


def apply(
    params: dict[str, Any],
    tokens_BT: Array,
    segments_BT: Array | None = None,
    positions_BT: Array | None = None,
    *,
    cfg: ModelConfig,
    dropout_keys_B: Array | None = None,
    constrain: Constrain = unconstrained,
) -> Array:
    """logits_BTV, float32: `forward` and the head. Rows without segments are one piece each, counted from 0.

    Raises ValueError for rows without positions that are longer than the learned table.
    """
    if positions_BT is None:
        if cfg.positions == "learned" and tokens_BT.shape[1] > cfg.position_rows:
            raise ValueError(
                f"rows of {tokens_BT.shape[1]} tokens are more than the model's {cfg.position_rows} learned positions: "
                "cut them"
            )
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    x_BTD = forward(
        params, tokens_BT, segments_BT, positions_BT, cfg=cfg, dropout_keys_B=dropout_keys_B, constrain=constrain
    )
    return logits(params, x_BTD, cfg=cfg, constrain=constrain)


def nll(
    params: dict[str, Any],
    tokens_BT: Array,
    targets_BT: Array,
    segments_BT: Array | None,
    positions_BT: Array,
    *,
    cfg: ModelConfig,
    dropout_keys_B: Array | None,
    constrain: Constrain,
    attend: Attend | None = None,
) -> Array:
    """Negative log-likelihood of every target, nll_BT in nats, float32, for whoever wants it by token; see `loss`."""
    x_BTD = forward(
        params,
        tokens_BT,
        segments_BT,
        positions_BT,
        cfg=cfg,
        dropout_keys_B=dropout_keys_B,
        constrain=constrain,
        attend=attend,
    )
    return head_nll(params, x_BTD, targets_BT, **_head(cfg, constrain, x_BTD.shape[0]))


def loss(
    params: dict[str, Any],
    tokens_BT: Array,
    targets_BT: Array,
    weights_BT: Array,
    segments_BT: Array | None,
    positions_BT: Array,
    *,
    cfg: ModelConfig,
    z_loss: float | None,
    dropout_keys_B: Array | None,
    constrain: Constrain,
    attend: Attend | None = None,
    gather: Gather | None = None,
) -> tuple[Array, Array]:
    """(objective, nats), summed over the batch with its weights: see `head_loss`. nats are those of `nll`.

    Args:
      gather: makes whole parameters of those that are split over devices: a layer's when it runs, all others at once.
    """
    if gather is not None:
        specs = model_specs(cfg)
        params = {name: x if name == "layers" else gather(x, specs[name]) for name, x in params.items()}
    x_BTD = forward(
        params,
        tokens_BT,
        segments_BT,
        positions_BT,
        cfg=cfg,
        dropout_keys_B=dropout_keys_B,
        constrain=constrain,
        attend=attend,
        gather=gather,
    )
    options = _head(cfg, constrain, x_BTD.shape[0])
    return head_loss(params, x_BTD, targets_BT, weights_BT, z_loss=z_loss, **options)


def forward(
    params: dict[str, Any],
    tokens_BT: Array,
    segments_BT: Array | None,
    positions_BT: Array,
    *,
    cfg: ModelConfig,
    dropout_keys_B: Array | None,
    constrain: Constrain,
    attend: Attend | None = None,
    gather: Gather | None = None,
) -> Array:
    """What the head reads, x_BTD, for rows of token ids.

    Args:
      params: the tree declared by `model_specs(cfg)`.
      tokens_BT: int32 ids below `cfg.vocabulary`.
      segments_BT: int32 pieces of each row, numbered from 1, 0 for padding; a token sees its own piece alone. None: one
        piece a row.
      positions_BT: int32, from 0 in each piece.
      cfg: a resolved config.
      dropout_keys_B: one PRNG key a row; None switches dropout off, as for evaluation.
      constrain: places an activation by the logical names of its axes.
      attend: the attention back end; None: one that runs wherever the arrays are.
      gather: makes the parameters of a layer whole when it runs; None: they are.
    """
    mask = AttentionMask(causal=True, query_segments_BT=segments_BT, key_segments_BS=segments_BT)
    if attend is None:
        attend = unplaced(cfg, tokens_BT.shape[1], dropout=dropout_keys_B is not None and cfg.dropout > 0)
    x_BTD, _ = _run(params, tokens_BT, positions_BT, mask, None, cfg, dropout_keys_B, constrain, attend, gather)
    return x_BTD


def forward_cached(
    params: dict[str, Any],
    tokens_BT: Array,
    segments_BT: Array,
    positions_BT: Array,
    cache: KeyValueCache,
    *,
    cfg: ModelConfig,
    constrain: Constrain,
) -> tuple[Array, KeyValueCache]:
    """`forward` of the next T tokens of every row, which see what the cache holds: x_BTD and the longer cache."""
    cache = cache.mark(segments_BT)
    mask = AttentionMask(True, segments_BT, cache.segments_BS, query_offset=cache.length)
    # The reference, for prompts too: a new token has but one row of scores, and the kernels don't know a cache.
    x_BTD, written = _run(params, tokens_BT, positions_BT, mask, cache, cfg, None, constrain, reference_attend)
    assert written is not None
    return x_BTD, written.advance(tokens_BT.shape[1])


def logits(params: dict[str, Any], x_BTD: Array, *, cfg: ModelConfig, constrain: Constrain) -> Array:
    """logits_BTV over the padded vocabulary, float32."""
    return lm_head(
        params,
        x_BTD,
        vocabulary=cfg.vocabulary,
        softcap=cfg.logit_softcap,
        numerics=numerics(cfg.compute_dtype),
        constrain=constrain,
    )


def _head(cfg: ModelConfig, constrain: Constrain, rows: int) -> dict[str, Any]:
    """How the head and its loss are computed for a batch of `rows`."""
    chunk = chunk_length(rows // batch_shards(constrain, rows), cfg.d_model, cfg.padded_vocabulary)
    return {
        "vocabulary": cfg.vocabulary,
        "softcap": cfg.logit_softcap,
        "numerics": numerics(cfg.compute_dtype),
        "constrain": constrain,
        "chunk": chunk,
    }


def _run(
    params: dict[str, Any],
    tokens_BT: Array,
    positions_BT: Array,
    mask: AttentionMask,
    cache: KeyValueCache | None,
    cfg: ModelConfig,
    dropout_keys_B: Array | None,
    constrain: Constrain,
    attend: Attend,
    gather: Gather | None = None,
) -> tuple[Array, KeyValueCache | None]:
    dropout = Dropout(cfg.dropout, dropout_keys_B) if dropout_keys_B is not None and cfg.dropout else None
    x_BTD = embed(
        params["embed"],
        tokens_BT,
        positions_BT,
        scale=math.sqrt(cfg.d_model) if cfg.embedding_scale else None,
        sinusoids=cfg.positions == "sinusoidal",
    ).astype(numerics(cfg.compute_dtype).dtype)
    x_BTD = drop(x_BTD, None if dropout is None else dropout.at(cfg.num_layers, EMBEDDING))
    x_BTD = constrain(x_BTD, ("batch", "length", "width"))
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
    )
    if cfg.norm_position != "post":
        x_BTD = norm(params["norm"], x_BTD, kind=cfg.norm, epsilon=cfg.norm_epsilon, offset=cfg.norm_offset)
    return x_BTD, cache
