"""Generation on ids, a batch of prompts or sources at a time: checked, begun, and gone on with until all have ended.

Shapes: B rows, M new tokens, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lm import beams, decoding
from lm.beams import Found, Search
from lm.config import InputError, ModelConfig
from lm.decoding import Sizes
from lm.generation_memory import check_memory
from lm.sampling import Sampling

TURN_TOKENS = 16
"""Tokens between two looks at the text for what it is to stop at."""
GREEDY = Sampling(0.0)


def room(cfg: ModelConfig, prompt_tokens: int) -> int | None:
    """New tokens that the learned positions leave after a prompt, 0 or less for none; None: as many as you like.

    Targets of an encoder_decoder follow one token.
    """
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
    stop_ids: Sequence[int] = (),
    seeds: Sequence[int] | None = None,
    indices: Sequence[int] | None = None,
    over: Callable[[int, np.ndarray], bool] | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
) -> list[np.ndarray]:
    """`lm.generation.generate` on ids, in one batch: what follows each prompt, or source, up to a stop id.

    Args:
      prompts: of an encoder_decoder the sources, with their EOS.
      end_id, stop_ids: all are stop ids.
      seeds: of each row, in place of `seed` and its index. indices: of the rows, that their draws depend on; None: 0, 1
        and so on.
      over: asked now and then, of beams at every token, whether a row may end after the ids that it has.
      num_beams, length_penalty, early_stopping: see `lm.beams.Search`; 1 is no search.

    Raises InputError for an empty prompt, where learned positions don't reach the end or memory for it isn't there, and
    for a beam search with draws.
    """
    if num_beams != 1:
        if sampling._replace(repetition_penalty=None) != GREEDY:
            raise InputError(
                f"num_beams is {num_beams}, and a beam search draws nothing: leave out what is said of sampling "
                "(temperature, top_k, top_p, min_p), or use num_beams 1"
            )
        how = Search(num_beams, length_penalty, early_stopping, repetition_penalty=sampling.repetition_penalty)
        found = search_ids(
            params, cfg, prompts, how, max_tokens=max_tokens, end_id=end_id, stop_ids=stop_ids, over=over
        )
        return [row[0].ids for row in found]
    new: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
    for _, now in turns(
        params,
        cfg,
        prompts,
        max_tokens=max_tokens,
        sampling=sampling,
        seed=seed,
        end_id=end_id,
        stop_ids=stop_ids,
        seeds=seeds,
        indices=indices,
        over=over,
        turn_tokens=max_tokens if over is None else TURN_TOKENS,
    ):
        new = now
    return new


def turns(
    params: Any,
    cfg: ModelConfig,
    prompts: Sequence[np.ndarray],
    *,
    max_tokens: int,
    sampling: Sampling,
    seed: int,
    end_id: int | None,
    stop_ids: Sequence[int] = (),
    seeds: Sequence[int] | None = None,
    indices: Sequence[int] | None = None,
    over: Callable[[int, np.ndarray], bool] | None = None,
    turn_tokens: int,
) -> Iterator[tuple[bool, list[np.ndarray]]]:
    """`generate_ids` as it goes: (whether that is all, the new ids of each row so far), every `turn_tokens` tokens.

    All that can be wrong is raised at the first one, before anything runs.
    """
    sampling.validate()
    stops = _checked(params, cfg, prompts, max_tokens, end_id, stop_ids)
    keys = _keys(len(prompts), seed, seeds, indices)
    if not prompts:
        return
    sizes = Sizes.of(cfg, prompts, max_tokens)
    check_memory(params, cfg, sizes, prompts=len(prompts))
    ready, begun = decoding.ready_params(params, cfg), decoding.begin(params, cfg, prompts, sizes)
    until, done, form, numbers = 0, False, sampling.form(), sampling.numbers()
    seen_BV = None if form.repetition_penalty is None else decoding.seen(cfg, prompts, sizes.rows)
    state = decoding.first_state(begun, jnp.asarray(_filled(keys, sizes.rows)), sizes.new, seen_BV)
    ended_by_text = np.zeros(sizes.rows, bool)
    while not done:
        until = min(until + turn_tokens, max_tokens)
        state = decoding.advance(
            ready,
            state,
            begun.memory,
            np.int32(until),
            np.array(stops, np.int32),
            numbers,
            cfg=cfg,
            form=form,
        )
        new_BM, ended_B, written = jax.device_get((state.new_BM, state.ended_B, state.written))
        rows = [_until(new_BM[row, :written], stops) for row in range(len(prompts))]
        if over is not None:
            fresh = np.array([not ended_B[row] and over(row, rows[row]) for row in range(len(prompts))])
            ended_by_text[: len(prompts)] |= fresh
            state = state._replace(ended_B=jnp.asarray(ended_B | ended_by_text))
        done = until == max_tokens or bool(np.all(ended_B | ended_by_text))
        yield done, rows


def search_ids(
    params: Any,
    cfg: ModelConfig,
    prompts: Sequence[np.ndarray],
    search: Search,
    *,
    max_tokens: int,
    end_id: int | None,
    stop_ids: Sequence[int] = (),
    over: Callable[[int, np.ndarray], bool] | None = None,
) -> list[list[Found]]:
    """The best `search.num_return` continuations of each prompt, or targets of each source, the best first.

    A beam also ends where `over` says so of its row and ids, which are given back with all that made it so.
    """
    search.validate().check_lengths(max_tokens)
    stops = _checked(params, cfg, prompts, max_tokens, end_id, stop_ids)
    if not prompts:
        return []
    sizes = Sizes.of(cfg, prompts, max_tokens, search.num_beams)
    check_memory(params, cfg, sizes, prompts=len(prompts))
    ready = decoding.ready_params(params, cfg)
    return beams.search(params, ready, cfg, list(prompts), sizes, search, max_tokens=max_tokens, stops=stops, over=over)


def _checked(
    params: Any,
    cfg: ModelConfig,
    prompts: Sequence[np.ndarray],
    max_tokens: int,
    end_id: int | None,
    stop_ids: Sequence[int],
) -> tuple[int, ...]:
    """The stop ids. Raises InputError on all that doesn't fit the model."""
    if not 1 <= max_tokens < 2**31:
        raise InputError(f"max_tokens is {max_tokens}: use 1 or more, and fewer than 2**31")
    wrong = [stop for stop in stop_ids if not 0 <= stop < cfg.vocabulary]
    if wrong:
        raise InputError(f"stop id {wrong[0]} is not one of the vocabulary: use 0 to {cfg.vocabulary - 1}")
    if cfg.has_encoder and cfg.start_id is None:
        raise InputError("the model has no id that targets follow: its model.start_id is None")
    longest = max(map(len, prompts), default=1)
    if not all(len(prompt) for prompt in prompts):
        raise InputError("an empty prompt, and a tokenizer with neither BOS nor EOS to begin with: give some text")
    if cfg.has_encoder and cfg.positions == "learned" and longest > cfg.position_rows:
        raise InputError(
            f"a source of {longest} tokens is more than the model's {cfg.position_rows} learned positions: shorten it"
        )
    left = room(cfg, 1 if cfg.has_encoder else longest)
    if left is not None and max_tokens > left:
        way_out = f"use max_tokens {left} or fewer" if left > 0 else "shorten the prompt"
        after = "" if cfg.has_encoder else f"a prompt of {longest} tokens and "
        raise InputError(
            f"{after}{max_tokens} new ones are more than the model's {cfg.position_rows} learned positions: {way_out}"
        )
    return tuple(dict.fromkeys([*([] if end_id is None else [end_id]), *stop_ids]))


def _keys(rows: int, seed: int, seeds: Sequence[int] | None, indices: Sequence[int] | None) -> jax.Array:
    """The key of each row: of its index and the seed, or of its own seed."""
    for each in [seed] if seeds is None else seeds:
        if not 0 <= each < 2**32:
            raise InputError(f"seed is {each}: use a whole number from 0 to 2**32 - 1")
    if seeds is not None:
        if len(seeds) != rows:
            raise InputError(f"there are {len(seeds)} seeds for {rows} prompts: give one for each")
        return jax.vmap(jax.random.key)(np.array(seeds, np.uint32))
    places = np.array(range(rows) if indices is None else indices, np.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), places)


def _filled(keys: jax.Array, rows: int) -> jax.Array:
    """With the first row's for the rows of padding."""
    return jnp.concatenate([keys, jnp.broadcast_to(keys[:1], (rows - len(keys),))])


def _until(ids: np.ndarray, stops: tuple[int, ...]) -> np.ndarray:
    ends = np.flatnonzero(np.isin(ids, stops))
    return ids[: ends[0]] if len(ends) else ids
