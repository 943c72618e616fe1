"""The models as pure functions of their parameters. Decoder-only: embedding, a causal stack of layers, head.
Encoder–decoder: each layer of that stack also reads what the encoder, an embedding and a stack that sees both ways, has
made of a source.

Shapes: B batch, T position, S position of a source, D model width, V vocabulary rows.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lm.config import ModelConfig
from lm.nn.attention import Attend, AttentionMask
from lm.nn.attention import attend as reference_attend
from lm.nn.attention_backend import unplaced
from lm.nn.cache import KeyValueCache
from lm.nn.chunked_nll import batch_shards, chunk_length, head_loss, head_nll
from lm.nn.decoder import Memory, reading_memory, reading_states
from lm.nn.encoder import Gather
from lm.nn.head import head_specs, lm_head
from lm.nn.initializers import initializers
from lm.nn.layers import Constrain, Dropout
from lm.nn.matmul import numerics
from lm.nn.params import Specs
from lm.nn.source import Source
from lm.nn.stack import run_stack, stack_specs

Array = jax.Array
ENCODER = 2**20
"""What the encoder's dropout is drawn for in the place of a layer: no stack has so many."""


def unconstrained(x: Array, axes: tuple[str, ...]) -> Array:
    """The `constrain` of a single device: leaves x where it is."""
    return x


def model_specs(cfg: ModelConfig) -> dict[str, Any]:
    """The declaration of every parameter of a resolved config."""
    specs = stack_specs(cfg)
    if cfg.has_encoder:
        specs["encoder"] = encoder = stack_specs(cfg.encoder)
        if cfg.share_embeddings:
            del encoder["embed"]["tokens"]
        if not encoder["embed"]:
            del encoder["embed"]
    table = initializers(cfg).table
    head = head_specs(cfg.d_model, cfg.padded_vocabulary, tied=cfg.tie_embeddings, bias=cfg.head_bias, init=table)
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
    source: Source | None = None,
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
        params,
        tokens_BT,
        segments_BT,
        positions_BT,
        cfg=cfg,
        dropout_keys_B=dropout_keys_B,
        constrain=constrain,
        source=source,
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
    source: Source | None = None,
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
        source=source,
    )
    return head_nll(params, _scaled(x_BTD, cfg), targets_BT, **_head(cfg, constrain, x_BTD.shape[0]))


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
    source: Source | None = None,
    label_smoothing: float | None = None,
) -> tuple[Array, Array]:
    """(objective, nats), summed over the batch with its weights: see `head_loss`. nats are those of `nll`.

    Args:
      gather: makes whole parameters of those that are split over devices: a layer's when it runs, all others at once.
    """
    if gather is not None:
        params = _all_but_layers(params, model_specs(cfg), gather)
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
        source=source,
    )
    return head_loss(
        params,
        _scaled(x_BTD, cfg),
        targets_BT,
        weights_BT,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
        **_head(cfg, constrain, x_BTD.shape[0]),
    )


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
    source: Source | None = None,
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
      source: what the encoder reads: a token sees what it makes of its own piece's number.

    Raises ValueError where a model with an encoder gets no source, or one without it gets one.
    """
    if cfg.has_encoder != (source is not None):
        wrong = "needs a source besides its tokens" if cfg.has_encoder else "has no encoder to read a source"
        raise ValueError(f"a model of family {cfg.family!r} {wrong}")
    if attend is None:
        attend = _anywhere(cfg, tokens_BT, dropout_keys_B)
    between = None
    if source is not None:
        memory_BSD = encode_source(
            params,
            source,
            cfg=cfg,
            dropout_keys_B=dropout_keys_B,
            constrain=constrain,
            attend=attend,
            gather=gather,
        )
        segments_BT = jnp.ones_like(tokens_BT) if segments_BT is None else segments_BT
        between = reading_states(
            memory_BSD, source.segments_BS, segments_BT, cfg=cfg, constrain=constrain, attend=attend
        )
    x_BTD, _ = run_stack(
        params,
        tokens_BT,
        positions_BT,
        AttentionMask(causal=True, query_segments_BT=segments_BT, key_segments_BS=segments_BT),
        cfg=cfg,
        dropout=_dropout(cfg, dropout_keys_B),
        constrain=constrain,
        attend=attend,
        gather=gather,
        between=between,
    )
    return x_BTD


def encode_source(
    params: dict[str, Any],
    source: Source,
    *,
    cfg: ModelConfig,
    dropout_keys_B: Array | None,
    constrain: Constrain,
    attend: Attend | None = None,
    gather: Gather | None = None,
) -> Array:
    """What the encoder makes of rows of sources, memory_BSD in the compute dtype: every id sees all of its own piece.

    Args: as for `forward`; `params` is the whole tree.
    """
    own = params["encoder"]
    shared = {"tokens": params["embed"]["tokens"]} if cfg.share_embeddings else {}
    segments_BS, dropout = source.segments_BS, _dropout(cfg, dropout_keys_B)
    memory_BSD, _ = run_stack(
        {**own, "embed": {**shared, **own.get("embed", {})}},
        source.tokens_BS,
        source.positions_BS,
        AttentionMask(causal=False, query_segments_BT=segments_BS, key_segments_BS=segments_BS),
        cfg=cfg.encoder,
        dropout=None if dropout is None else dropout.at(ENCODER),
        constrain=constrain,
        attend=_anywhere(cfg, source.tokens_BS, dropout_keys_B) if attend is None else attend,
        gather=gather,
    )
    return memory_BSD


def forward_cached(
    params: dict[str, Any],
    tokens_BT: Array,
    segments_BT: Array,
    positions_BT: Array,
    cache: KeyValueCache,
    *,
    cfg: ModelConfig,
    constrain: Constrain,
    memory: Memory | None = None,
) -> tuple[Array, KeyValueCache]:
    """`forward` of the next T tokens of every row, which see what the cache holds: x_BTD and the longer cache.

    Args:
      params: `params["layers"]` may be a sequence of the parameters of each layer.
      memory: what `lm.nn.decoder.remember` has made of the sources, for a model with an encoder.
    """
    assert cfg.has_encoder == (memory is not None), "a model with an encoder decodes from a memory, no other does"
    cache = cache.mark(segments_BT)
    attend, keys, offset = reference_attend, cache.segments_BS, cache.length  # the kernels don't know a cache
    if cache.known_empty:
        keys, offset = segments_BT, 0
        attend = _anywhere(cfg, tokens_BT, None) if cfg.attention == "auto" else reference_attend
    x_BTD, written = run_stack(
        params,
        tokens_BT,
        positions_BT,
        AttentionMask(True, segments_BT, keys, query_offset=offset),
        cfg=cfg,
        dropout=None,
        constrain=constrain,
        attend=attend,
        cache=cache,
        between=None
        if memory is None
        else reading_memory(memory, segments_BT, cfg=cfg, constrain=constrain, attend=attend),
    )
    assert written is not None
    return x_BTD, written.advance(tokens_BT.shape[1])


def logits(params: dict[str, Any], x_BTD: Array, *, cfg: ModelConfig, constrain: Constrain) -> Array:
    """logits_BTV over the padded vocabulary, float32."""
    return lm_head(
        params,
        _scaled(x_BTD, cfg),
        vocabulary=cfg.vocabulary,
        softcap=cfg.logit_softcap,
        numerics=numerics(cfg.compute_dtype),
        constrain=constrain,
    )


def _scaled(x_BTD: Array, cfg: ModelConfig) -> Array:
    return x_BTD if cfg.logit_scale is None else x_BTD * cfg.logit_scale


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


def _all_but_layers(params: dict[str, Any], specs: Specs, gather: Gather) -> dict[str, Any]:
    """The parameters, whole but for those of stacks of layers."""

    def whole(name: str) -> Any:
        if name == "encoder":
            return _all_but_layers(params[name], specs[name], gather)
        return params[name] if name == "layers" else gather(params[name], specs[name])

    return {name: whole(name) for name in params}


def _dropout(cfg: ModelConfig, keys_B: Array | None) -> Dropout | None:
    return Dropout(cfg.dropout, keys_B) if keys_B is not None and cfg.dropout else None


def _anywhere(cfg: ModelConfig, tokens_BT: Array, dropout_keys_B: Array | None) -> Attend:
    return unplaced(cfg, tokens_BT.shape[1], dropout=dropout_keys_B is not None and cfg.dropout > 0)
