"""Decoding on the device: what prompts or sources leave behind, and a token a turn from there on.

All is compiled once for a bucket of shapes: rows to a power of two, tokens to the next of four sizes an octave.

Shapes: B rows, P tokens of prompts but the last, S source, M new tokens, V vocabulary rows, E stop ids.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import ModelConfig
from lm.cores import have_bfloat16, usable_cores
from lm.nn import language_model
from lm.nn.cache import KeyValueCache
from lm.nn.decoder import NAME, Memory, cross_specs, remember
from lm.nn.encoder import layer_specs
from lm.nn.language_model import unconstrained
from lm.nn.matmul import Turned, numerics
from lm.nn.params import ParamSpec
from lm.nn.source import Source
from lm.sampling import Numbers, Sampling, pick

Array = jax.Array
LEAST_TOKENS = 16
"""The smallest bucket of tokens."""
LARGE_CACHE = 8 * 2**20
"""Bytes of a layer's keys and values from which they are in parts: to read less saves 0.4 ms a layer and token then; to
compile, the parts take a tenth of a second a layer."""
MOST_SHARES = 16
"""Shares of a matrix's columns at most, on a CPU of many cores."""


def bucket(tokens: int) -> int:
    """The size that a number of tokens is padded to: of four an octave, so that a fifth is padding at most."""
    if tokens <= LEAST_TOKENS:
        return LEAST_TOKENS
    quarter = _quarter(tokens)
    return -(-tokens // quarter) * quarter


def _quarter(tokens: int) -> int:
    """A fourth of the greatest power of two below a number of tokens."""
    return 1 << max((tokens - 1).bit_length() - 3, 0)


def row_bucket(rows: int) -> int:
    """The number of rows that a batch is padded to: a power of two."""
    return 1 << (rows - 1).bit_length()


class Begun(NamedTuple):
    """Rows ready to go on: all of their prompts but the last token is in the cache.

    token_B, position_B: that last token, and where it stands. memory: of an encoder_decoder's sources. rows: that are
    asked for; those behind them are padding. prompt_slots: of the cache, before that last token.
    """

    cache: KeyValueCache
    memory: Memory | None
    token_B: Any
    position_B: Any
    rows: int
    prompt_slots: int


class Sizes(NamedTuple):
    """The shapes that a batch takes. `new` are the slots for what is written; `source` is 0 without an encoder; `beams`
    are those of a row."""

    rows: int
    prompt: int
    new: int
    source: int
    beams: int = 1

    @classmethod
    def of(cls, cfg: ModelConfig, prompts: Sequence[np.ndarray], max_tokens: int, beams: int = 1) -> Sizes:
        longest, rows = max(map(len, prompts)), row_bucket(len(prompts))
        if cfg.has_encoder:
            return cls(rows, 0, bucket(max_tokens), bucket(longest), beams)
        prompt = 0 if longest == 1 else bucket(longest - 1)
        return cls(rows, prompt, bucket(prompt + max_tokens) - prompt, 0, beams)

    @property
    def slots(self) -> int:
        return self.prompt + self.new


def begin(params: Any, cfg: ModelConfig, prompts: Sequence[np.ndarray], sizes: Sizes) -> Begun:
    """Reads the prompts, or of an encoder_decoder the sources, of one batch."""
    rows = len(prompts)
    filled = [*prompts, *[prompts[0]] * (sizes.rows - rows)]
    if cfg.has_encoder:
        tokens_BS, segments_BS = np.zeros((2, sizes.rows, sizes.source), np.int32)
        for row, source in enumerate(filled):
            tokens_BS[row, : len(source)] = source
            segments_BS[row, : len(source)] = 1
        positions_BS = np.broadcast_to(np.arange(sizes.source, dtype=np.int32), tokens_BS.shape)
        memory = _remember(params, Source(tokens_BS, segments_BS, positions_BS), cfg=cfg)
        start_B = np.full(sizes.rows, cfg.start_id, np.int32)
        return Begun(empty_cache(cfg, sizes), memory, start_B, np.zeros_like(start_B), rows, 0)
    last_B = np.array([prompt[-1] for prompt in filled], np.int32)
    before_B = np.array([len(prompt) - 1 for prompt in filled], np.int32)
    if not sizes.prompt:
        return Begun(empty_cache(cfg, sizes), None, last_B, before_B, rows, 0)
    tokens_BP, segments_BP = np.zeros((2, sizes.rows, sizes.prompt), np.int32)
    for row, prompt in enumerate(filled):
        place = slice(sizes.prompt - len(prompt) + 1, None)
        tokens_BP[row, place], segments_BP[row, place] = prompt[:-1], 1
    cache = _prefill(params, tokens_BP, segments_BP, cfg=cfg, sizes=sizes)
    return Begun(cache, None, last_B, before_B, rows, sizes.prompt)


def seen(cfg: ModelConfig, prompts: Sequence[np.ndarray], rows: int) -> np.ndarray:
    """seen_BV, bool: which tokens each prompt has, of a target the one that it follows; none in rows of padding."""
    seen_BV = np.zeros((rows, cfg.padded_vocabulary), bool)
    for row, prompt in enumerate(prompts):
        seen_BV[row, np.array([cfg.start_id]) if cfg.has_encoder else prompt] = True
    return seen_BV


def empty_cache(cfg: ModelConfig, sizes: Sizes) -> KeyValueCache:
    """That of every row, before there are several beams of it.

    Layers with a sliding window get a ring: but with relative positions, which are counted by slots. All is in the
    compute dtype, but on a CPU in float32: of bfloat16 it would convert all at each token, there and back. A large one
    is there in five to eight parts, so that what is empty needn't be read.
    """
    windows = [None if cfg.positions == "relative" else kind.window for kind in cfg.layer_pattern]
    K, H, slots = cfg.kv_heads, cfg.head_width, sizes.slots
    if jax.default_backend() == "cpu":
        large = 8 * sizes.rows * sizes.beams * slots * K * H >= LARGE_CACHE
        part = _quarter(slots) if large else None
        return KeyValueCache.empty(cfg.num_layers, sizes.rows, slots, K, H, "float32", windows, part)
    return KeyValueCache.empty(cfg.num_layers, sizes.rows, slots, K, H, numerics(cfg.compute_dtype).dtype, windows)


@functools.partial(jax.jit, static_argnames=("cfg", "sizes"))
def _prefill(params: Any, tokens_BP: Array, segments_BP: Array, *, cfg: ModelConfig, sizes: Sizes) -> KeyValueCache:
    P = tokens_BP.shape[1]
    before_B1 = P - jnp.sum(segments_BP, axis=1, keepdims=True)
    _, cache = language_model.forward_cached(
        params,
        tokens_BP,
        segments_BP,
        jnp.maximum(jnp.arange(P)[None] - before_B1, 0),
        empty_cache(cfg, sizes),
        cfg=cfg,
        constrain=unconstrained,
    )
    return cache


@functools.partial(jax.jit, static_argnames=("cfg",))
def _remember(params: Any, source: Source, *, cfg: ModelConfig) -> Memory:
    memory_BSD = language_model.encode_source(params, source, cfg=cfg, dropout_keys_B=None, constrain=unconstrained)
    return remember(params["layers"], memory_BSD, source.segments_BS, cfg=cfg, constrain=unconstrained)


def step(
    ready: Any,
    token_B: Array,
    position_B: Array,
    cache: KeyValueCache,
    memory: Memory | None,
    *,
    cfg: ModelConfig,
) -> tuple[Array, KeyValueCache]:
    """logits_BV after one more token of every row, and the longer cache."""
    x_B1D, cache = language_model.forward_cached(
        ready,
        token_B[:, None],
        jnp.ones_like(token_B)[:, None],
        position_B[:, None],
        cache,
        cfg=cfg,
        constrain=unconstrained,
        memory=memory,
    )
    return language_model.logits(ready, x_B1D, cfg=cfg, constrain=unconstrained)[:, 0], cache


class State(NamedTuple):
    """Rows under way. written: how many tokens there are. new_BM: these. seen_BV: what a row has, if that counts."""

    written: Array
    ended_B: Array
    new_BM: Array
    token_B: Array
    position_B: Array
    keys_B: Array
    seen_BV: Array | None
    cache: KeyValueCache


def first_state(begun: Begun, keys_B: Array, new: int, seen_BV: np.ndarray | None) -> State:
    """Of rows that have begun: nothing is written, and the rows of padding have ended."""
    B = len(begun.token_B)
    cache = begun.cache._replace(length=jnp.int32(begun.cache.length))
    return State(
        jnp.int32(0),
        jnp.arange(B) >= begun.rows,
        jnp.zeros((B, new), jnp.int32),
        jnp.asarray(begun.token_B),
        jnp.asarray(begun.position_B),
        keys_B,
        None if seen_BV is None else jnp.asarray(seen_BV),
        cache,
    )


@functools.partial(jax.jit, static_argnames=("cfg", "form"), donate_argnames=("state",))
def advance(
    ready: Any,
    state: State,
    memory: Memory | None,
    until: Array,
    stops_E: Array,
    numbers: Numbers,
    *,
    cfg: ModelConfig,
    form: Sampling,
) -> State:
    """Writes tokens until there are `until` of them, or every row has ended by a stop id, which is written too.

    Args:
      ready: of `ready_params`. form, numbers: of a Sampling.
    """
    ready = with_head(ready, cfg, greedy=form.greedy and form.repetition_penalty is None)

    def unfinished(state: State) -> Array:
        return (state.written < until) & ~jnp.all(state.ended_B)

    def turn(state: State) -> State:
        logits_BV, cache = step(ready, state.token_B, state.position_B, state.cache, memory, cfg=cfg)
        keys_B = None if form.greedy else jax.vmap(jax.random.fold_in, (0, None))(state.keys_B, state.written)
        token_B = pick(logits_BV, keys_B, numbers, form, state.seen_BV)
        seen_BV = state.seen_BV
        if seen_BV is not None:
            seen_BV = seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
        return State(
            state.written + 1,
            state.ended_B | is_stop(token_B, stops_E),
            jax.lax.dynamic_update_slice(state.new_BM, token_B[:, None], (0, state.written)),
            token_B,
            state.position_B + 1,
            state.keys_B,
            seen_BV,
            cache,
        )

    return jax.lax.while_loop(unfinished, turn, state)


def is_stop(tokens: Array, stops_E: Array) -> Array:
    return jnp.any(tokens[..., None] == stops_E.reshape((1,) * tokens.ndim + (-1,)), axis=-1)


def with_head(ready: Any, cfg: ModelConfig, *, greedy: bool) -> Any:
    """A tied head, as `ready_params` lays out matrices: the table lies so already.

    One that can't be shared out gives logits a column a row. The best of each is found in them as they are; for all
    else they would be copied, which takes longer than the product gains.
    """
    first = ready["layers"][0]["attention"]["qkv"]
    if "kernel" in ready.get("head", {}) or not isinstance(first, Turned):
        return ready
    table_VD = ready["embed"]["tokens"]
    if table_VD.dtype != first.w_CnK.dtype:
        return ready
    shares = math.gcd(first.w_CnK.shape[0], len(table_VD))
    if shares == 1 and not greedy:
        return ready
    turned = Turned(table_VD.reshape(shares, -1, cfg.d_model), (cfg.d_model, len(table_VD)))
    return {**ready, "head": {**ready.get("head", {}), "kernel": turned}}


_kept: list[tuple[Any, list[weakref.ref], Any]] = []  # (how, the leaves, what they were made into): of one model


def ready_params(params: Any, cfg: ModelConfig) -> Any:
    """The parameters as decoding reads them: those of each layer apart, and on a CPU laid out for few rows.

    The layers are copies. Those of the last model are kept for the next call, as long as it is there.
    """
    leaves = jax.tree.leaves(params)
    placed = all(isinstance(leaf, jax.Array) for leaf in leaves)
    how = (jax.tree.structure(params), cfg.compute_dtype)
    for kept_how, kept_leaves, made in _kept:
        if placed and kept_how == how and all(a() is b for a, b in zip(kept_leaves, leaves, strict=True)):
            return made
    _kept.clear()
    devices = leaves[0].devices() if placed else {jax.local_devices()[0]}
    turning = len(devices) == 1 and next(iter(devices)).platform == "cpu"
    made = _ready(params, cfg=cfg, shares=min(usable_cores(), MOST_SHARES) if turning else None)
    if placed:
        _kept.append((how, [weakref.ref(leaf, lambda _: _kept.clear()) for leaf in leaves], made))
    return made


def _ready(params: Any, *, cfg: ModelConfig, shares: int | None) -> Any:
    """For products with few rows matrices are in the compute dtype, but on a CPU that has no bfloat16 products, which
    take several times as long there, in float32."""
    dtype = numerics(cfg.compute_dtype).dtype if shares is None or have_bfloat16() else "float32"
    own = {name: params[name] for name in ("layers", "head", "embed") if name in params}
    made = _unstacked(own, cfg=cfg, shares=shares, dtype=dtype)
    return {**{name: part for name, part in params.items() if name != "encoder"}, **made}


@functools.partial(jax.jit, static_argnames=("cfg", "shares", "dtype"))
def _unstacked(params: Any, *, cfg: ModelConfig, shares: int | None, dtype: str) -> Any:
    specs = {**layer_specs(cfg), **(cross_specs(cfg) if cfg.has_encoder else {})}

    def turned(w: Array, inputs: int) -> Any:
        w = w.astype(numerics(cfg.compute_dtype).dtype).astype(dtype)
        return w if shares is None else Turned.of(w, inputs=inputs, shares=shares)

    def laid_out(spec: ParamSpec, w: Array) -> Any:
        return turned(w, spec.inputs) if spec.inputs and w.ndim > 1 else w

    def layer(index: int) -> Any:
        own = jax.tree.map(lambda w: w[index], params["layers"])
        made = jax.tree.map(laid_out, specs, own, is_leaf=lambda x: isinstance(x, ParamSpec))
        if cfg.has_encoder:  # the memory holds what it would make
            made[NAME] = {name: w for name, w in made[NAME].items() if name != "kv"}
        return made

    found = {"layers": tuple(layer(index) for index in range(cfg.num_layers))}
    head = params.get("head", {})
    if "kernel" in head:
        head = {**head, "kernel": turned(head["kernel"], 1)}
    elif shares is not None and params["embed"]["tokens"].dtype != dtype:  # else `with_head` takes it as it lies
        kernel = turned(params["embed"]["tokens"].T, 1)
        if len(kernel.w_CnK) > 1:
            head = {**head, "kernel": kernel}
    return found | ({"head": head} if head else {})
