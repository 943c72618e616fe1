"""Writing text with a model of either family: a decoder goes on after prompts, an encoder_decoder writes the targets of
sources. Drawn or greedy, or by a beam search; `lm.token_generation` does it on ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.beams import Search
from lm.config import InputError, ModelConfig
from lm.data.tokenizer import Tokenizer
from lm.sampling import Sampling
from lm.token_generation import generate_ids, room, search_ids

USUAL_TOKENS = 128
"""How long a continuation is when nothing says it."""


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
    size, found = _together(batch_size, rows), dict[int, str]()
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
    size, found = _together(batch_size, rows), dict[int, list[Candidate]]()
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


def _together(batch_size: int | None, rows: Sequence[Any]) -> int:
    """How many rows are written at a time; None: all."""
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: use 1 or more")
    return max(len(rows), 1) if batch_size is None else batch_size


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
