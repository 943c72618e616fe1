"""What a model writes for sources: their translations or summaries, by one function for both families.

An encoder_decoder reads the source; a decoder-only model goes on after the source and the separator that it was trained
with (`data.pair_separator`). Both write up to EOS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lm import generation
from lm.beams import Search
from lm.checkpoint import Loaded
from lm.config import InputError
from lm.data.tokenizer import Tokenizer
from lm.decoding import Sizes
from lm.generation_memory import check_memory
from lm.sampling import Sampling
from lm.token_generation import generate_ids, room

Progress = Callable[[int, int], None]


class Decoding(NamedTuple):
    """How texts are written: greedily, or by a beam search. `batch_size` changes no result.

    length_penalty None: 1, that is beams are compared by their log-probability a token.
    """

    max_tokens: int
    num_beams: int = 1
    length_penalty: float | None = None
    batch_size: int = 32

    @property
    def power(self) -> float | None:
        """The length penalty that is used; None without a search."""
        return self.length_penalty if self.num_beams == 1 or self.length_penalty is not None else 1.0

    def validate(self) -> Decoding:
        """Raises InputError on a value out of range; returns the object itself."""
        for name in ("max_tokens", "num_beams", "batch_size"):
            if not 1 <= getattr(self, name) < 2**31:
                raise InputError(f"{name} is {getattr(self, name)}: use 1 or more, and fewer than 2**31")
        if self.length_penalty is not None and not math.isfinite(self.length_penalty):
            raise InputError(f"length_penalty is {self.length_penalty}: use a finite number, 1 to compare means")
        if self.length_penalty is not None and self.num_beams == 1:
            raise InputError(
                f"length_penalty is {self.length_penalty}, but a single beam has no texts of other lengths to compare: "
                "use num_beams 2 or more, or leave it out"
            )
        return self


class Written(NamedTuple):
    """A text that a model wrote, and of how many tokens, EOS left out.

    ended: by EOS, not by max_tokens. cut: only the beginning of its source was read.
    """

    text: str
    tokens: int
    ended: bool
    cut: bool


def predict(run: Loaded, sources: Sequence[str], decoding: Decoding, progress: Progress | None = None) -> list[Written]:
    """What the model writes for each source, in their order. Those of like length are written together.

    Args:
      progress: is told how many are written and how many there are.

    Raises InputError where a source leaves no room for max_tokens.
    """
    if not sources:
        return []
    prompts, cut = _read(run, sources)
    check_room(run, prompts, decoding)
    params, text = _at_hand(run.params), _tokenizer(run)
    size = min(decoding.batch_size, len(prompts))
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # what is too much for memory fails at once
    written: dict[int, Written] = {}
    for start in range(0, len(order), size):
        some = order[start : start + size]
        filled = [*some, *[some[-1]] * (size - len(some))]  # the last batch has the others' shape
        ids = _write(run, params, [prompts[i] for i in filled], decoding)
        for i, new in zip(some, ids, strict=False):
            written[i] = Written(text.decode(new).strip(), len(new), len(new) < decoding.max_tokens, cut[i])
        if progress is not None:
            progress(len(written), len(order))
    return [written[i] for i in range(len(sources))]


def prompts_of(run: Loaded, sources: Sequence[str]) -> list[np.ndarray]:
    """The ids that the model is given for each source: an encoder's source with EOS; else BOS, source and separator.

    Where an encoder was trained on sources cut to a length, they are cut to it here too, and where its positions are
    learned to these. A decoder-only model's are cut, before the separator, to its context, unless its positions are
    learned: then `check_room` says what is too long.
    """
    return _read(run, sources)[0]


def _read(run: Loaded, sources: Sequence[str]) -> tuple[list[np.ndarray], list[bool]]:
    """`prompts_of`, and which of the sources are cut."""
    config = run.config
    if not config.model.has_encoder:
        separator = config.data.pair_separator
        prompts = [generation.prompt_ids(_tokenizer(run), source + separator) for source in sources]
        longest = None if config.model.positions == "learned" else config.model.position_rows
        if longest is None or max(map(len, prompts), default=0) <= longest:
            return prompts, [False] * len(prompts)
        end = _tokenizer(run).encode(separator)
        cut = [len(ids) > longest for ids in prompts]
        return [
            np.append(ids[: max(longest - len(end), 1)], end) if over else ids
            for ids, over in zip(prompts, cut, strict=True)
        ], cut
    reader = run.source_tokenizer or _tokenizer(run)
    whole = [generation.source_ids(reader, source) for source in sources]
    trained = config.data.source_length if run.step else None  # an imported model has been trained on nothing here
    learned = config.model.position_rows if config.model.positions == "learned" else None
    longest = min((limit for limit in (trained, learned) if limit is not None), default=None)
    if longest is None:
        return whole, [False] * len(whole)
    cut = [len(ids) > longest for ids in whole]
    return [generation.shortened(ids, longest, reader.eos) for ids in whole], cut


def check_room(run: Loaded, prompts: Sequence[np.ndarray], decoding: Decoding) -> None:
    """Raises InputError where learned positions don't reach as far as max_tokens after the longest prompt, where
    memory doesn't hold the keys and values of the longest batch, and where there are fewer tokens than beams need."""
    most = sorted(prompts, key=len)[-decoding.batch_size :]
    _check_positions(run, prompts, decoding)
    if decoding.num_beams > 1:
        search = Search(decoding.num_beams, decoding.power or 0.0)
        search.check_candidates(run.config.model, int(_tokenizer(run).eos is not None))
        search.check_lengths(decoding.max_tokens)
    sizes = Sizes.of(run.config.model, most, decoding.max_tokens, decoding.num_beams)
    check_memory(run.params, run.config.model, sizes, prompts=len(most))


def _check_positions(run: Loaded, prompts: Sequence[np.ndarray], decoding: Decoding) -> None:
    longest = 1 if run.config.model.has_encoder else max(map(len, prompts))  # a target begins with one id
    left = room(run.config.model, longest)
    if left is not None and decoding.max_tokens > left:
        after = "" if run.config.model.has_encoder else f" after a source of {longest} tokens"
        way_out = f"use {left} or fewer" if left > 0 else "leave such sources out"
        raise InputError(
            f"{decoding.max_tokens} new tokens{after} are more than the model's {run.config.model.position_rows} "
            f"learned positions: {way_out}"
        )


def _write(run: Loaded, params: Any, prompts: list[np.ndarray], decoding: Decoding) -> list[np.ndarray]:
    """The new ids of one batch."""
    beams: dict[str, Any] = {}
    if decoding.num_beams > 1:
        beams = {"num_beams": decoding.num_beams, "length_penalty": decoding.power}
    return generate_ids(
        params,
        run.config.model,
        prompts,
        max_tokens=decoding.max_tokens,
        sampling=Sampling(0.0),
        seed=0,
        end_id=_tokenizer(run).eos,
        **beams,
    )


def _tokenizer(run: Loaded) -> Tokenizer:
    assert run.tokenizer is not None, "checked before"
    return run.tokenizer


def _at_hand(params: Any) -> Any:
    """The parameters on one device of this process if every device has them all; else where they are.

    What is written by a copy on each device would be the same everywhere.
    """
    if all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params)):
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), params)
    return params
