"""Continuing prompts: prefill and decoding with a key/value cache, compiled once a shape.

Shapes: B prompts, P padded prompt length, T tokens fed at once, V vocabulary rows, M new tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import InputError, ModelConfig
from lm.data.tokenizer import Tokenizer
from lm.nn import language_model
from lm.nn.cache import KeyValueCache
from lm.nn.matmul import numerics

Array = jax.Array
USUAL_TOKENS = 128
"""How long a continuation is when nothing says it."""


class Sampling(NamedTuple):
    """How the next token is chosen. temperature 0 is greedy; top_k and top_p None are off."""

    temperature: float
    top_k: int | None = None
    top_p: float | None = None

    def validate(self) -> Sampling:
        """Raises InputError on a value out of range; returns the object itself."""
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature is {self.temperature}: use 0 for greedy, or more, but finite")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}: use 1 or more, or None")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}: use a probability above 0 and up to 1, or None")
        return self


def generate(
    params: Any,
    cfg: ModelConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_tokens: int | None,
    sampling: Sampling,
    seed: int,
) -> list[str]:
    """The continuations of the prompts, without them, each up to EOS or `max_tokens` tokens.

    max_tokens None is USUAL_TOKENS, or what learned positions leave room for. A prompt follows the tokenizer's BOS
    (else its EOS). A row's tokens depend on its prompt, its index and the seed, not on the other prompts.
    """
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    if max_tokens is None:
        left = room(cfg, max(map(len, rows), default=0))
        max_tokens = USUAL_TOKENS if left is None else max(min(USUAL_TOKENS, left), 1)
    ids = generate_ids(params, cfg, rows, max_tokens=max_tokens, sampling=sampling, seed=seed, end_id=tokenizer.eos)
    return [_continuation(tokenizer, prompt, new) for prompt, new in zip(rows, ids, strict=True)]


def _continuation(tokenizer: Tokenizer, prompt: np.ndarray, new: np.ndarray) -> str:
    """The text of new ids as it follows the prompt: some tokenizers drop a space at the beginning of a text."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode(np.concatenate([prompt, new]))
    return whole.removeprefix(before) if whole.startswith(before) else tokenizer.decode(new)


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> np.ndarray:
    """What the model is fed for a prompt: BOS (else EOS) and the prompt's own ids. Raises InputError on broken text."""
    head = [] if tokenizer.first_id is None else [tokenizer.first_id]
    try:
        return np.concatenate([np.array(head, np.int32), tokenizer.encode(prompt)])
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt {prompt!r} is not UTF-8: set a UTF-8 locale, or mend the text") from error


def room(cfg: ModelConfig, prompt_tokens: int) -> int | None:
    """New tokens that the learned positions leave after a prompt, 0 or less for none; None: as many as you like."""
    return cfg.position_rows - prompt_tokens + 1 if cfg.positions == "learned" else None


def generate_ids(
    params: Any,
    cfg: ModelConfig,
    prompts: Sequence[np.ndarray],
    *,
    max_tokens: int,
    sampling: Sampling,
    seed: int,
    end_id: int | None,
) -> list[np.ndarray]:
    """`generate` on ids: the new ids of each prompt, up to and without `end_id`.

    Raises InputError for an empty prompt, and where learned positions don't reach the end.
    """
    sampling.validate()
    if not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed}: use a whole number from 0 to 2**32 - 1")
    if max_tokens < 1:
        raise InputError(f"max_tokens is {max_tokens}: use 1 or more")
    if not prompts:
        return []
    longest = max(len(prompt) for prompt in prompts)
    if not all(len(prompt) for prompt in prompts):
        raise InputError("an empty prompt, and a tokenizer with neither BOS nor EOS to begin with: give some text")
    left = room(cfg, longest)
    if left is not None and max_tokens > left:
        way_out = f"use max_tokens {left} or fewer" if left > 0 else "shorten the prompt"
        raise InputError(
            f"a prompt of {longest} tokens and {max_tokens} new ones are more than the model's {cfg.position_rows} "
            f"learned positions: {way_out}"
        )
    width = 1 << max(longest - 1, 3).bit_length()  # a power of two: few shapes to compile
    tokens_BP, segments_BP = np.zeros((2, len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BP[row, width - len(prompt) :] = prompt
        segments_BP[row, width - len(prompt) :] = 1
    new_BM = _decode(
        params,
        tokens_BP,
        segments_BP,
        jax.random.key(seed),
        jnp.float32(sampling.temperature),
        cfg=cfg,
        max_tokens=max_tokens,
        sampling=sampling._replace(temperature=float(sampling.temperature > 0)),  # greedy or not: all that is compiled
        end_id=end_id,
    )
    return [_until(row, end_id) for row in np.asarray(new_BM)]


@functools.partial(jax.jit, static_argnames=("cfg", "max_tokens", "sampling", "end_id"))
def _decode(
    params: Any,
    tokens_BP: Array,
    segments_BP: Array,
    key: Array,
    temperature: Array,
    *,
    cfg: ModelConfig,
    max_tokens: int,
    sampling: Sampling,
    end_id: int | None,
) -> Array:
    """new_BM: prefill of the padded prompts, then a token a turn until all rows have ended; end_id fills the rest."""
    B, P = tokens_BP.shape
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))
    dtype = numerics(cfg.compute_dtype).dtype
    cache = KeyValueCache.empty(cfg.num_layers, B, P + max_tokens - 1, cfg.kv_heads, cfg.head_width, dtype)

    def feed(tokens_BT: Array, segments_BT: Array, positions_BT: Array, cache: KeyValueCache) -> tuple:
        x_BTD, cache = language_model.forward_cached(
            params, tokens_BT, segments_BT, positions_BT, cache, cfg=cfg, constrain=language_model.unconstrained
        )
        last_B1V = language_model.logits(params, x_BTD[:, -1:], cfg=cfg, constrain=language_model.unconstrained)
        return last_B1V[:, 0], cache

    def choose(logits_BV: Array, index: Array) -> Array:
        return pick(logits_BV, jax.vmap(jax.random.fold_in, (0, None))(keys_B, index), temperature, sampling)

    lengths_B = jnp.sum(segments_BP, axis=1)
    positions_BP = jnp.maximum(jnp.arange(P)[None, :] - (P - lengths_B)[:, None], 0)
    fill = 0 if end_id is None else end_id

    def ended(token_B: Array) -> Array:
        return jnp.zeros((B,), bool) if end_id is None else token_B == end_id

    def unfinished(carry: tuple) -> Array:
        index, ended_B, *_ = carry
        return (index < max_tokens) & ~jnp.all(ended_B)

    def turn(carry: tuple) -> tuple:
        index, ended_B, new_BM, token_B, cache = carry
        positions_B1 = (lengths_B + index - 1)[:, None]
        logits_BV, cache = feed(token_B[:, None], jnp.ones((B, 1), jnp.int32), positions_B1, cache)
        token_B = jnp.where(ended_B, fill, choose(logits_BV, index))
        new_BM = jax.lax.dynamic_update_slice(new_BM, token_B[:, None], (0, index))
        return index + 1, ended_B | ended(token_B), new_BM, token_B, cache

    logits_BV, cache = feed(tokens_BP, segments_BP, positions_BP, cache)
    token_B = choose(logits_BV, jnp.int32(0))
    new_BM = jnp.full((B, max_tokens), fill, jnp.int32).at[:, 0].set(token_B)
    return jax.lax.while_loop(unfinished, turn, (jnp.int32(1), ended(token_B), new_BM, token_B, cache))[2]


def pick(logits_BV: Array, keys_B: Array, temperature: Array, sampling: Sampling) -> Array:
    """The next token of each row, int32: the best, or drawn from softmax(logits / temperature) cut to top_k and top_p.

    top_p keeps the fewest tokens whose probabilities reach p (Holtzman et al. 2020, arXiv:1904.09751).
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / temperature  # 0 at most: none overflows
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        least_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
        least_B1 = jnp.min(jnp.where(before_BV < sampling.top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def _until(ids: np.ndarray, end_id: int | None) -> np.ndarray:
    if end_id is None:
        return ids
    ends = np.flatnonzero(ids == end_id)
    return ids[: ends[0]] if len(ends) else ids
