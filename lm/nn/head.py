"""The language-model head and its loss.

Shapes: B batch, T position, D model width, V vocabulary rows. Where only V matters there may be any axes before it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lm.nn import params as declare
from lm.nn.layers import Constrain
from lm.nn.matmul import Numerics, Turned, product
from lm.nn.params import Initializer, ParamSpec

Array = jax.Array


def head_specs(width: int, vocabulary: int, *, tied: bool, bias: bool, init: Initializer) -> dict[str, ParamSpec]:
    """A tied head has no matrix of its own."""
    specs = {}
    if not tied:
        specs["kernel"] = ParamSpec((width, vocabulary), ("embed", "vocab"), init, inputs=1)
    if bias:
        specs["bias"] = ParamSpec((vocabulary,), ("vocab",), declare.zeros)
    return specs


def lm_head(
    params: dict[str, Any],
    x_BTD: Array,
    *,
    vocabulary: int,
    softcap: float | None,
    numerics: Numerics,
    constrain: Constrain,
) -> Array:
    """logits_BTV, float32, over the padded vocabulary; rows past `vocabulary` are -inf.

    Args:
      params: the model's whole tree: a head without a kernel of its own uses the embedding table (Press & Wolf 2017).
      softcap: bounds the logits by softcap · tanh(logits / softcap) (Gemma 2, arXiv:2408.00118); None: off.
    """
    B, T, D = x_BTD.shape
    head, x_MD = params.get("head", {}), x_BTD.reshape(B * T, D)
    if isinstance(head.get("kernel"), Turned):
        logits_MV = head["kernel"].product(x_MD, numerics)
    elif "kernel" in head:
        logits_MV = product(x_MD, head["kernel"], False, numerics)
    else:
        logits_MV = product(x_MD, params["embed"]["tokens"], True, numerics)
    logits_BTV = constrain(logits_MV.reshape(B, T, -1), ("batch", "length", "vocab"))
    return finish_logits(logits_BTV, head.get("bias"), vocabulary=vocabulary, softcap=softcap)


def finish_logits(logits_BTV: Array, bias_V: Array | None, *, vocabulary: int | Array, softcap: float | None) -> Array:
    """The logits of a head's product: bias added, capped, -inf past `vocabulary`; `lm_head` says more."""
    if bias_V is not None:
        logits_BTV = logits_BTV + bias_V.reshape((1,) * (logits_BTV.ndim - 1) + bias_V.shape)
    if softcap is not None:
        logits_BTV = softcap * jnp.tanh(logits_BTV / softcap)
    if not isinstance(vocabulary, int) or logits_BTV.shape[-1] > vocabulary:
        logits_BTV = jnp.where(token_ids(logits_BTV) < vocabulary, logits_BTV, -jnp.inf)
    return logits_BTV


def token_nll(logits_BTV: Array, targets_BT: Array) -> Array:
    """nll_BT = logsumexp(logits) - logits[target], in nats, float32."""
    return jax.nn.logsumexp(logits_BTV, axis=-1) - target_logit(logits_BTV, targets_BT)


def uniform_nll(logits_BTV: Array, log_z_BT: Array, *, vocabulary: int) -> Array:
    """The mean of -log p over all ids below `vocabulary`, [B, T], in nats, float32."""
    real_BTV = jnp.where(token_ids(logits_BTV) < vocabulary, logits_BTV, 0.0)
    return log_z_BT - jnp.sum(real_BTV, axis=-1) / vocabulary


def target_logit(logits_BTV: Array, targets_BT: Array) -> Array:
    """logits[target], [B, T]."""
    # A masked sum, not a gather: it stays local where the vocabulary is split over devices.
    return jnp.sum(jnp.where(token_ids(logits_BTV) == targets_BT[:, :, None], logits_BTV, 0.0), axis=-1)


def token_ids(logits_BTV: Array) -> Array:
    """The id that each logit belongs to, [B, T, V]."""
    return jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, logits_BTV.ndim - 1)


def entries(x_BTV: Array, at_BT: Array) -> Array:
    """An entry of each row, [B, T]; where `at` lies outside, an arbitrary one."""
    return jnp.take_along_axis(x_BTV, at_BT[..., None], axis=-1, mode="clip")[..., 0]


def with_entries(x_BTV: Array, own_BT: Array, at_BT: Array) -> Array:
    """x with an entry of each row replaced; none where `at` lies outside."""
    V = x_BTV.shape[-1]
    rows_MV, at_M = x_BTV.reshape(-1, V), at_BT.reshape(-1)
    at_M = jnp.where(at_M < 0, V, at_M)
    row_M = jnp.arange(rows_MV.shape[0])
    rows_MV = rows_MV.at[row_M, at_M].set(own_BT.reshape(-1), mode="drop", unique_indices=True)
    return rows_MV.reshape(x_BTV.shape)
