"""Writing text with a model of either family: a decoder goes on after prompts, an encoder_decoder writes the targets of
sources. Drawn or greedy, or by a beam search.

Shapes: B rows, M new tokens, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import beams, decoding
from lm.beams import Found, Search
from lm.config import InputError, ModelConfig
from lm.data.tokenizer import Tokenizer
from lm.decoding import Sizes
from lm.sampling import Sampling, pick

__all__ = [
    "USUAL_TOKENS",
    "Candidate",
    "Found",
    "Sampling",
    "Search",
    "TextModel",
    "generate",
    "generate_ids",
    "n_best",
]
__all__ += ["pick", "prompt_ids", "room", "search_ids", "source_ids", "turns"]

USUAL_TOKENS = 128
"""How long a continuation is when nothing says it."""
TURN_TOKENS = 16
"""Tokens between two looks at the text for what it is to stop at."""
GREEDY = Sampling(0.0)


class Candidate(NamedTuple):
    """One text of several for a prompt: `score` is its log-probability, in nats, over tokens^length_penalty."""

    text: str
    score: float


class TextModel(NamedTuple):
    """A model that writes text. params: its tree. source_tokenizer: of an encoder_decoder's sources; None: the same.

    context: tokens that it reads at most; None: any number.
    """

    params: Any
    cfg: ModelConfig
    tokenizer: Tokenizer
    source_tokenizer: Tokenizer | None = None
    context: int | None = None

    def read(self, prompts: Sequence[str]) -> list[np.ndarray]:
        """The ids that the model is given for each prompt, or source. Raises InputError for one that is too long."""
        if self.cfg.has_encoder:
            found = [source_ids(self.source_tokenizer or self.tokenizer, prompt) for prompt in prompts]
        else:
            found = [prompt_ids(self.tokenizer, prompt) for prompt in prompts]
        longest = max(map(len, found), default=0)
        if self.context is not None and longest > self.context:
            what = "source" if self.cfg.has_encoder else "prompt"
            raise InputError(
                f"a {what} of {longest:,} tokens is longer than the model's context of {self.context:,}: shorten it"
            )
        return found

    def tokens(self, prompts: Sequence[np.ndarray], max_tokens: int | None) -> int:
        """max_tokens, or of None what is usual, as far as there is room."""
        if max_tokens is not None:
            return max_tokens
        longest = 1 if self.cfg.has_encoder else max(map(len, prompts), default=0)
        left = room(self.cfg, longest)
        return USUAL_TOKENS if left is None else max(min(USUAL_TOKENS, left), 1)

    def text(self, prompt: np.ndarray, new: np.ndarray) -> str:
        """What new ids say after a prompt."""
        return self.tokenizer.decode(new) if self.cfg.has_encoder else _continuation(self.tokenizer, prompt, new)


def generate(
    params: Any,
    cfg: ModelConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_tokens: int | None,
    sampling: Sampling,
    seed: int,
    source_tokenizer: Tokenizer | None = None,
    context: int | None = None,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    seeds: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> list[str]:
    """The continuations of the prompts, without them, or the targets of sources.

    Each goes up to EOS, one of `stop_ids`, one of the texts in `stop`, none of which is in it, or `max_tokens` tokens.
    max_tokens None is USUAL_TOKENS, or what learned positions leave room for. A prompt follows the tokenizer's BOS
    (else its EOS), a source comes before its EOS. A row's tokens depend on its prompt, and on its index and the seed or
    on its own one of `seeds`: not on the other prompts, nor on how many are written at a time (`batch_size`).
    """
    model = TextModel(params, cfg, tokenizer, source_tokenizer, context)
    rows = model.read(prompts)
    check_stop(stop)
    size, found = batch_size or max(len(rows), 1), dict[int, str]()
    if size < 1:
        raise InputError(f"batch_size is {size}: use 1 or more")
    max_tokens = model.tokens(rows, max_tokens)
    if seeds is not None and len(seeds) != len(rows):
        raise InputError(f"there are {len(seeds)} seeds for {len(rows)} prompts: give one for each")
    order = sorted(range(len(rows)), key=lambda i: len(rows[i])) if len(rows) > size else list(range(len(rows)))
    for start in range(0, len(order), size):
        some = order[start : start + size]
        prompts_now = [rows[i] for i in some]

        def over(row: int, new: np.ndarray, prompts_now: list[np.ndarray] = prompts_now) -> bool:
            return any(each in model.text(prompts_now[row], new) for each in stop)

        ids = generate_ids(
            params,
            cfg,
            prompts_now,
            max_tokens=max_tokens,
            sampling=sampling,
            seed=seed,
            end_id=tokenizer.eos,
            stop_ids=stop_ids,
            seeds=None if seeds is None else [seeds[i] for i in some],
            indices=some,
            over=over if stop else None,
        )
        for i, new in zip(some, ids, strict=True):
            found[i] = before(model.text(rows[i], new), stop)
    return [found[i] for i in range(len(rows))]


def n_best(
    params: Any,
    cfg: ModelConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    search: Search,
    *,
    max_tokens: int | None,
    source_tokenizer: Tokenizer | None = None,
    context: int | None = None,
    stop_ids: Sequence[int] = (),
    batch_size: int | None = None,
) -> list[list[Candidate]]:
    """The best `search.num_return` texts for each prompt, or source, that a beam search finds, and their scores."""
    model = TextModel(params, cfg, tokenizer, source_tokenizer, context)
    rows = model.read(prompts)
    size, found = batch_size or max(len(rows), 1), dict[int, list[Candidate]]()
    if size < 1:
        raise InputError(f"batch_size is {size}: use 1 or more")
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), size):
        some = order[start : start + size]
        several = search_ids(
            params,
            cfg,
            [rows[i] for i in some],
            search,
            max_tokens=model.tokens(rows, max_tokens),
            end_id=tokenizer.eos,
            stop_ids=stop_ids,
        )
        for i, row in zip(some, several, strict=True):
            found[i] = [Candidate(model.text(rows[i], each.ids), each.score) for each in row]
    return [found[i] for i in range(len(rows))]


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> np.ndarray:
    """What the model is fed for a prompt: BOS (else EOS) and the prompt's own ids. Raises InputError on broken text."""
    head = [] if tokenizer.first_id is None else [tokenizer.first_id]
    return np.concatenate([np.array(head, np.int32), _encoded(tokenizer, prompt)])


def source_ids(tokenizer: Tokenizer, source: str) -> np.ndarray:
    """What an encoder is fed for a source: its ids and EOS. Raises InputError on broken text."""
    end = [] if tokenizer.eos is None else [tokenizer.eos]
    return np.concatenate([_encoded(tokenizer, source), np.array(end, np.int32)])


def _encoded(tokenizer: Tokenizer, text: str) -> np.ndarray:
    try:
        return tokenizer.encode(text)
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt {text!r} is not UTF-8: set a UTF-8 locale, or mend the text") from error


def _continuation(tokenizer: Tokenizer, prompt: np.ndarray, new: np.ndarray) -> str:
    """The text of new ids as it follows the prompt: some tokenizers drop a space at the beginning of a text."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode(np.concatenate([prompt, new]))
    return whole.removeprefix(before) if whole.startswith(before) else tokenizer.decode(new)


def before(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of the texts that it stops at."""
    return text[: min((text.index(each) for each in stop if each in text), default=len(text))]


def check_stop(stop: Sequence[str]) -> None:
    """Raises InputError for a text to stop at that is in every text."""
    if any(not each for each in stop):
        raise InputError("stop has an empty text, which every text begins with: leave it out")


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
    """`generate` on ids, in one batch: the new ids of each prompt, or source, up to and without a stop id.

    Args:
      prompts: of an encoder_decoder the sources, with their EOS.
      end_id, stop_ids: all are stop ids.
      seeds: of each row, in place of `seed` and its index. indices: of the rows, that their draws depend on; None: 0, 1
        and so on.
      over: asked now and then whether a row may end after the ids that it has.
      num_beams, length_penalty, early_stopping: see `lm.beams.Search`; 1 is no search.

    Raises InputError for an empty prompt, where learned positions don't reach the end or memory for it isn't there, and
    for a beam search with draws.
    """
    if num_beams != 1:
        if sampling != GREEDY:
            raise InputError(
                f"num_beams is {num_beams}, and a beam search draws nothing: leave out what is said of sampling "
                "(temperature and all that goes with it), or use num_beams 1"
            )
        if over is not None:
            raise InputError(f"num_beams is {num_beams}, and a beam search stops at ids alone: leave stop texts out")
        how = Search(num_beams, length_penalty, early_stopping)
        found = search_ids(params, cfg, prompts, how, max_tokens=max_tokens, end_id=end_id, stop_ids=stop_ids)
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
    decoding.check_memory(params, cfg, sizes, beams=1, prompts=len(prompts))
    ready, begun = decoding.ready_params(params, cfg), decoding.begin(params, cfg, prompts, sizes)
    seen_BV = None
    if sampling.repetition_penalty is not None:
        seen_BV = np.zeros((sizes.rows, cfg.padded_vocabulary), bool)
        for row, prompt in enumerate(prompts):
            seen_BV[row, np.array([cfg.start_id]) if cfg.has_encoder else prompt] = True
    state = decoding.first_state(begun, jnp.asarray(_filled(keys, sizes.rows)), sizes.new, seen_BV)
    until, done, form, numbers = 0, False, sampling.form(), sampling.numbers()
    if form.repetition_penalty is None:
        state = state._replace(seen_BV=None)
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
) -> list[list[Found]]:
    """The best `search.num_return` continuations of each prompt, or targets of each source, the best first."""
    search.validate()
    stops = _checked(params, cfg, prompts, max_tokens, end_id, stop_ids)
    if not prompts:
        return []
    sizes = Sizes.of(cfg, prompts, max_tokens)
    decoding.check_memory(params, cfg, sizes, beams=search.num_beams, prompts=len(prompts))
    ready = decoding.ready_params(params, cfg)
    return beams.search(params, ready, cfg, list(prompts), sizes, search, max_tokens=max_tokens, stops=stops)


def _checked(
    params: Any,
    cfg: ModelConfig,
    prompts: Sequence[np.ndarray],
    max_tokens: int,
    end_id: int | None,
    stop_ids: Sequence[int],
) -> tuple[int, ...]:
    """The stop ids. Raises InputError on all that doesn't fit the model."""
    if max_tokens < 1:
        raise InputError(f"max_tokens is {max_tokens}: use 1 or more")
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
