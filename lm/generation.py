"""Writing text with a model of either family: a decoder goes on after prompts, an encoder_decoder writes the targets of
sources. Drawn or greedy, or by a beam search; `lm.token_generation` does it on ids.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
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
        for number, ids in enumerate(found, 1):
            if self.context is not None and len(ids) > self.context:
                what = "source" if self.cfg.has_encoder else "prompt"
                what = f"{what} {number}," if len(found) > 1 else f"a {what}"
                raise InputError(
                    f"{what} of {len(ids):,} tokens is longer than the model's context of {self.context:,}: shorten it"
                )
        return found

    def tokens(self, prompt: np.ndarray, max_tokens: int | None) -> int:
        """max_tokens, or of None what is usual, as far as there is room after the prompt."""
        if max_tokens is not None:
            return operator.index(max_tokens)
        left = room(self.cfg, 1 if self.cfg.has_encoder else len(prompt))
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
    found = dict[int, str]()
    if seeds is not None and len(seeds) != len(rows):
        raise InputError(f"there are {len(seeds)} seeds for {len(rows)} prompts: give one for each")
    for tokens, some in _batches(model, rows, max_tokens, batch_size):
        prompts_now = [rows[i] for i in some]
        ids = generate_ids(
            params,
            cfg,
            prompts_now,
            max_tokens=tokens,
            sampling=sampling,
            seed=seed,
            end_id=tokenizer.eos,
            stop_ids=stop_ids,
            seeds=None if seeds is None else [seeds[i] for i in some],
            indices=some,
            over=_stopping(model, prompts_now, stop),
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
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    batch_size: int | None = None,
) -> list[list[Candidate]]:
    """The best `search.num_return` texts for each prompt, or source, that a beam search finds, and their scores.

    A text ends at EOS, one of `stop_ids`, one of the texts in `stop`, or `max_tokens` tokens. What it stops at isn't in
    it, but counts in its score.
    """
    model = TextModel(params, cfg, tokenizer, source_tokenizer, context)
    rows = model.read(prompts)
    check_stop(stop)
    search.validate()
    found = dict[int, list[Candidate]]()
    for tokens, some in _batches(model, rows, max_tokens, batch_size):
        prompts_now = [rows[i] for i in some]
        several = search_ids(
            params,
            cfg,
            prompts_now,
            search,
            max_tokens=tokens,
            end_id=tokenizer.eos,
            stop_ids=stop_ids,
            over=_stopping(model, prompts_now, stop),
        )
        for i, row in zip(some, several, strict=True):
            found[i] = [Candidate(before(model.text(rows[i], each.ids), stop), each.score) for each in row]
    return [found[i] for i in range(len(rows))]


def _stopping(
    model: TextModel, prompts: Sequence[np.ndarray], stop: Sequence[str]
) -> Callable[[int, np.ndarray], bool] | None:
    """Whether a prompt's new ids say one of the texts in `stop`; None where there are none."""
    if not stop:
        return None
    return lambda row, new: any(each in model.text(prompts[row], new) for each in stop)


def _batches(
    model: TextModel, rows: Sequence[np.ndarray], max_tokens: int | None, batch_size: int | None
) -> Iterator[tuple[int, list[int]]]:
    """(new tokens at most, numbers of the rows) that are written together; all at once for a batch_size of None.

    The longest come first, so that what is too long, or too much for memory, fails before anything is written.
    """
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: use 1 or more")
    limits = [model.tokens(row, max_tokens) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for limit, group in itertools.groupby(order, key=lambda i: limits[i]):
        alike = list(group)
        for start in range(0, len(alike), size := batch_size or len(alike)):
            yield limit, alike[start : start + size]


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> np.ndarray:
    """What the model is fed for a prompt: BOS (else EOS) and the prompt's own ids. Raises InputError on broken text."""
    head = [] if tokenizer.first_id is None else [tokenizer.first_id]
    return np.concatenate([np.array(head, np.int32), _encoded(tokenizer, prompt)])


def source_ids(tokenizer: Tokenizer, source: str) -> np.ndarray:
    """What an encoder is fed for a source: its ids and EOS. Raises InputError on broken text."""
    end = [] if tokenizer.eos is None else [tokenizer.eos]
    return np.concatenate([_encoded(tokenizer, source), np.array(end, np.int32)])


def shortened(source: np.ndarray, longest: int, eos: int | None) -> np.ndarray:
    """The beginning of a source's ids, as training cuts it: an EOS at its end stays there."""
    if len(source) <= longest or eos is None:
        return source[:longest]
    return np.append(source[: longest - 1], source[-1:])


def _encoded(tokenizer: Tokenizer, text: str) -> np.ndarray:
    try:
        text.encode()  # some tokenizers say less clearly that they can't
        return tokenizer.encode(text)
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt {text!r} is not UTF-8: set a UTF-8 locale, or mend the text") from error


def _continuation(tokenizer: Tokenizer, prompt: np.ndarray, new: np.ndarray) -> str:
    """The text of new ids as it follows the prompt: some tokenizers drop a space at the beginning of a text."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode(np.concatenate([prompt, new]))
    return whole.removeprefix(before) if whole.startswith(before) else tokenizer.decode(new)


def before(text: str, stop: Sequence[str]) -> str:
    """The text up to the one that it stops at: of those in it the one that was complete first."""
    found = [(text.index(each) + len(each), text.index(each)) for each in stop if each in text]
    return text[: min(found)[1]] if found else text


def check_stop(stop: Sequence[str]) -> None:
    """Raises InputError for a text to stop at that is in every text, and for one that can be in none."""
    if any(not each for each in stop):
        raise InputError("stop has an empty text, which every text begins with: leave it out")
    for each in stop:
        try:
            each.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the stop {each!r} is not UTF-8, so no text has it: mend it, or leave it out") from error
