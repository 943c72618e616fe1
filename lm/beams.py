"""Beam search: the likeliest continuations that a search with W beams finds, scored by log-probability over length^p.

The rule is that of the Hugging Face transformers library, token for token: at each turn the best 2 W continuations of a
row's W beams are looked at; those of the best W that end are finished, at
score = Σ log p / tokens^length_penalty with the end counted; the best W of the others go on.

Shapes: B rows, W beams, C = 2 W or more candidates, M new tokens, V vocabulary rows, E stop ids, R = B W.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import InputError, ModelConfig
from lm.decoding import Begun, Sizes, begin, is_stop, seen, step, with_head
from lm.nn.cache import KeyValueCache
from lm.nn.decoder import Memory
from lm.sampling import check_repetition_penalty, penalized

Array = jax.Array
NEVER = -1.0e9
"""The score of what isn't there: finite, as sums with it are taken."""


class Search(NamedTuple):
    """A beam search.

    length_penalty: the power of its number of tokens that a beam's log-probability is divided by: above 0 longer ones
      win, below shorter ones.
    early_stopping: True: a row ends as soon as as many beams as there are have ended. False: as soon as the best that
      goes on, were it to end now, is no better than the worst that has ended. "never": as soon as it can't become
      better at any length.
    num_return: how many are given back, the best first.
    repetition_penalty: log-probabilities of tokens that a beam has already, prompt included, are multiplied by it
      before they are added up: above 1 they become less likely. None: off.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return: int = 1
    repetition_penalty: float | None = None

    def validate(self) -> Search:
        """Raises InputError on a value out of range; returns the object itself."""
        if self.num_beams < 1:
            raise InputError(f"num_beams is {self.num_beams}: use 1 or more")
        if not 1 <= self.num_return <= self.num_beams:
            raise InputError(
                f"num_return is {self.num_return}, and {self.num_beams} beams find {self.num_beams} texts at most: use "
                f"1 to {self.num_beams}, or more beams"
            )
        if not np.isfinite(self.length_penalty):
            raise InputError(f"length_penalty is {self.length_penalty}: use a finite number")
        if self.early_stopping not in (True, False, "never"):
            raise InputError(f"early_stopping is {self.early_stopping!r}: use True, False or 'never'")
        check_repetition_penalty(self.repetition_penalty)
        return self

    def check_lengths(self, max_tokens: int) -> None:
        """Raises InputError where so many tokens to the power of the penalty are beyond what float32 tells apart."""
        most = 1e30 if self.length_penalty > 0 else 1e6
        if abs(self.length_penalty) * math.log(max(max_tokens, 1)) > math.log(most):
            raise InputError(
                f"length_penalty is {self.length_penalty}, and {max_tokens:,} tokens to the power of it are beyond "
                f"float32: use {math.copysign(math.log(most) / math.log(max_tokens), self.length_penalty):.2g} or "
                "nearer to 0"
            )

    def check_candidates(self, cfg: ModelConfig, stops: int) -> None:
        """Raises InputError where there are fewer tokens than it looks at a turn, with so many stop ids."""
        each = max(2, 1 + stops)
        if each * self.num_beams > cfg.vocabulary:
            raise InputError(
                f"num_beams is {self.num_beams}, which looks at {each * self.num_beams} tokens a turn, and there are "
                f"{cfg.vocabulary}: use {cfg.vocabulary // each} or fewer"
            )


class Found(NamedTuple):
    """What a search gives for a row: new ids without the stop id, and the score. `ended`: by a stop id."""

    ids: np.ndarray
    score: float
    ended: bool


class _State(NamedTuple):
    """written: how many tokens. running, scores: of the beams that go on, Σ log p. finished_*: of those that have
    ended, best first: ids, score, tokens, and whether there is one. open_B: whether a row can still get better.
    seen_RV: what a beam has, if that counts. cache: None while a turn's first half has it."""

    written: Array
    running_BWM: Array
    scores_BW: Array
    finished_BWM: Array
    finished_scores_BW: Array
    finished_lengths_BW: Array
    finished_BW: Array
    open_B: Array
    token_R: Array
    position_R: Array
    seen_RV: Array | None
    cache: Any


class _Form(NamedTuple):
    """What is compiled in. lengthening: how good a beam can become is judged at max_tokens, else at its length."""

    cfg: ModelConfig
    beams: int
    prompt_slots: int
    early_stopping: bool | str
    lengthening: bool


class _Numbers(NamedTuple):
    """What isn't. powers_L: tokens^length_penalty by tokens."""

    max_tokens: Any
    stops_E: Any
    powers_L: Any
    repetition_penalty: Any


class _Candidates(NamedTuple):
    """The continuations that are looked at in a turn, the best first: Σ log p, beam of the row, token, ids with it; and
    the cache of the beams that they continue."""

    totals_BC: Array
    parents_BC: Array
    tokens_BC: Array
    ids_BCM: Array
    cache: KeyValueCache


def search(
    params: Any,
    ready: Any,
    cfg: ModelConfig,
    prompts: list[np.ndarray],
    sizes: Sizes,
    how: Search,
    *,
    max_tokens: int,
    stops: tuple[int, ...],
    over: Callable[[int, np.ndarray], bool] | None = None,
) -> list[list[Found]]:
    """The best `num_return` of each prompt, or source, of one batch.

    Args:
      ready: of `decoding.ready_params`.
      over: whether a row's beam ends with the ids that it has, for another reason than a stop id; it is asked about
        every candidate.

    Raises InputError where there are fewer tokens than candidates.
    """
    how.check_candidates(cfg, len(stops))
    begun = begin(params, cfg, prompts, sizes)
    tokens = np.arange(sizes.new + 2, dtype=np.float64)
    tokens[0] = 1.0  # never read
    penalty = how.repetition_penalty
    numbers = _Numbers(
        np.int32(max_tokens),
        np.array(stops, np.int32),
        (tokens**how.length_penalty).astype(np.float32),
        np.float32(1.0 if penalty is None else penalty),
    )
    lengthening = how.early_stopping == "never" and how.length_penalty > 0
    form = _Form(cfg, how.num_beams, begun.prompt_slots, how.early_stopping, lengthening)
    seen_BV = None if penalty in (None, 1) else seen(cfg, prompts, sizes.rows)
    state = _first(begun._replace(rows=0, prompt_slots=0), np.int32(begun.rows), seen_BV, form=form, new=sizes.new)
    if over is None:
        state = _whole(ready, state, begun.memory, numbers, form=form)
    else:
        state = _asking(ready, state, begun.memory, numbers, form, over, len(prompts))
    ids, scores, lengths = jax.device_get((state.finished_BWM, state.finished_scores_BW, state.finished_lengths_BW))
    return [
        [_found(ids[b, w, : lengths[b, w]], scores[b, w], stops) for w in range(how.num_return)]
        for b in range(len(prompts))
    ]


def _found(ids_M: np.ndarray, score: np.ndarray, stops: tuple[int, ...]) -> Found:
    ended = bool(len(ids_M)) and int(ids_M[-1]) in stops
    return Found(ids_M[:-1] if ended else ids_M, float(score), ended)


def _asking(
    ready: Any,
    state: _State,
    memory: Memory | None,
    numbers: _Numbers,
    form: _Form,
    over: Callable[[int, np.ndarray], bool],
    rows: int,
) -> _State:
    """`_whole`, with the host asked at each turn which candidates are over."""
    written = 0
    while bool(_unfinished(state, numbers, form=form)):
        state, cache = state._replace(cache=None), state.cache
        found = _looked_at(ready, state, cache, memory, numbers, form=form)
        ids_BCM, written = jax.device_get(found.ids_BCM), written + 1
        over_BC = np.zeros(ids_BCM.shape[:2], bool)
        for row in range(rows):
            over_BC[row] = [over(row, ids[:written]) for ids in ids_BCM[row]]
        state = _chosen(state, found, numbers, over_BC, form=form)
    return state


@functools.partial(jax.jit, static_argnames=("form", "new"))
def _first(begun: Begun, rows: Array, seen_BV: Array | None, *, form: _Form, new: int) -> _State:
    """Nothing is written. begun: one row a prompt; the first `rows` of them are asked for."""
    B, W = begun.token_B.shape[0], form.beams
    extra_B1 = jnp.arange(B)[:, None] >= rows
    missing_BW = jnp.full((B, W), NEVER, jnp.float32)
    cache = begun.cache.repeat(W)
    nothing_BWM = jnp.zeros((B, W, new), jnp.int32)
    return _State(
        written=jnp.int32(0),
        running_BWM=nothing_BWM,
        scores_BW=missing_BW.at[:, 0].set(0.0),  # all beams are one yet: its continuations alone count
        finished_BWM=nothing_BWM,
        finished_scores_BW=missing_BW,
        finished_lengths_BW=jnp.zeros((B, W), jnp.int32),
        finished_BW=jnp.broadcast_to(extra_B1, (B, W)),
        open_B=~extra_B1[:, 0],
        token_R=jnp.repeat(begun.token_B, W),
        position_R=jnp.repeat(begun.position_B, W),
        seen_RV=None if seen_BV is None else jnp.repeat(seen_BV, W, axis=0),
        cache=cache._replace(length=jnp.int32(cache.length)),
    )


@functools.partial(jax.jit, static_argnames=("form",), donate_argnames=("state",))
def _whole(ready: Any, state: _State, memory: Memory | None, numbers: _Numbers, *, form: _Form) -> _State:
    """The whole search."""

    def turn(state: _State) -> _State:
        found = _looked_at(ready, state, state.cache, memory, numbers, form=form)
        return _chosen(state, found, numbers, None, form=form)

    return jax.lax.while_loop(lambda state: _unfinished(state, numbers, form=form), turn, state)


@functools.partial(jax.jit, static_argnames=("form",))
def _unfinished(state: _State, numbers: _Numbers, *, form: _Form) -> Array:
    more = jnp.any(state.open_B) & (state.written < numbers.max_tokens)
    return more & ~jnp.all(state.finished_BW) if form.early_stopping is True else more


@functools.partial(jax.jit, static_argnames=("form",), donate_argnames=("cache",))
def _looked_at(
    ready: Any, state: _State, cache: KeyValueCache, memory: Memory | None, numbers: _Numbers, *, form: _Form
) -> _Candidates:
    """A turn's first half: one more token of every beam, whose keys and values are in `cache`."""
    ready = with_head(ready, form.cfg, greedy=False)
    logits_RV, cache = step(ready, state.token_R, state.position_R, cache, memory, cfg=form.cfg)
    (B, W), V = state.scores_BW.shape, logits_RV.shape[1]
    log_RV = jax.nn.log_softmax(logits_RV, axis=-1)
    if state.seen_RV is not None:
        log_RV = penalized(log_RV, state.seen_RV, numbers.repetition_penalty)
    totals_BWV = log_RV.reshape(B, W, V) + state.scores_BW[:, :, None]
    count = max(2, 1 + numbers.stops_E.shape[0]) * W
    totals_BC, places_BC = jax.lax.top_k(totals_BWV.reshape(B, W * V), count)
    parents_BC, tokens_BC = places_BC // V, (places_BC % V).astype(jnp.int32)
    ids_BCM = jnp.take_along_axis(state.running_BWM, parents_BC[:, :, None], axis=1)
    ids_BCM = jax.lax.dynamic_update_slice(ids_BCM, tokens_BC[:, :, None], (0, 0, state.written))
    return _Candidates(totals_BC, parents_BC, tokens_BC, ids_BCM, cache)


@functools.partial(jax.jit, static_argnames=("form",))
def _chosen(state: _State, found: _Candidates, numbers: _Numbers, over_BC: Array | None, *, form: _Form) -> _State:
    """Its second half: which candidates go on, and which have ended. over_BC: those that end for another reason than a
    stop id."""
    totals_BC, parents_BC, tokens_BC, ids_BCM, cache = found
    (B, W), count, length = state.scores_BW.shape, totals_BC.shape[1], state.written + 1
    max_tokens, stops_E, powers_L, _ = numbers
    ends_BC = is_stop(tokens_BC, stops_E) | (length >= max_tokens)
    if over_BC is not None:
        ends_BC |= over_BC

    # The best that go on. As many end by ids as there are beams times stop ids at most, so of these there are enough.
    scores_BW, best_BW = jax.lax.top_k(totals_BC + jnp.where(ends_BC, NEVER, 0.0), W)
    parents_BW = jnp.take_along_axis(parents_BC, best_BW, axis=1)

    # Those that end, of the best W.
    finished_BC = ends_BC & (jnp.arange(count) < W)[None]
    ended_BC = totals_BC / powers_L[length] + jnp.where(finished_BC, 0.0, NEVER)
    closed_B = ~state.open_B
    if form.early_stopping is True:
        closed_B |= jnp.all(state.finished_BW, axis=1)
    ended_BC += jnp.where(closed_B, NEVER, 0.0)[:, None]
    merged_scores = jnp.concatenate([state.finished_scores_BW, ended_BC], axis=1)
    finished_scores_BW, kept_BW = jax.lax.top_k(merged_scores, W)

    def kept(old: Array, fresh: Array) -> Array:
        both = jnp.concatenate([old, fresh], axis=1)
        index = kept_BW.reshape(kept_BW.shape + (1,) * (both.ndim - 2))
        return jnp.take_along_axis(both, index, axis=1)

    finished_BW = kept(state.finished_BW, finished_BC)
    lengths_BC = jnp.full((B, count), length)
    at = powers_L[max_tokens] if form.lengthening else powers_L[length]
    worst_B1 = jnp.min(finished_scores_BW, axis=1, keepdims=True)
    better_B = jnp.any(scores_BW[:, :1] / at > jnp.where(finished_BW, worst_B1, NEVER), axis=1)
    rows_R = (jnp.arange(B)[:, None] * W + parents_BW).reshape(-1)
    token_R = jnp.take_along_axis(tokens_BC, best_BW, axis=1).reshape(-1)
    seen_RV = state.seen_RV
    if seen_RV is not None:
        seen_RV = seen_RV[rows_R].at[jnp.arange(B * W), token_R].set(True)
    return _State(
        length,
        jnp.take_along_axis(ids_BCM, best_BW[:, :, None], axis=1),
        scores_BW,
        kept(state.finished_BWM, ids_BCM),
        finished_scores_BW,
        kept(state.finished_lengths_BW, lengths_BC),
        finished_BW,
        state.open_B & better_B,
        token_R,
        state.position_R + 1,
        seen_RV,
        cache.reorder(rows_R, form.prompt_slots),
    )
