"""A text as it is written, piece by piece."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from lm.generation import TextModel, before, check_stop
from lm.sampling import Sampling
from lm.token_generation import turns

BROKEN = "\ufffd"
"""What a tokenizer makes of bytes that aren't a character, or not yet one."""


def stream(
    model: TextModel,
    prompt: str,
    *,
    max_tokens: int | None,
    sampling: Sampling,
    seed: int,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
) -> Iterator[str]:
    """Pieces of what `lm.generation.generate` gives for a prompt, or source: together they are that text.

    A piece has whole characters: bytes of one that isn't complete wait for the rest, and what may be the beginning of a
    text to stop at waits until it isn't. All that can be wrong is raised before the first piece is asked for.
    """
    check_stop(stop)
    [ids] = model.read([prompt])
    under_way = turns(
        model.params,
        model.cfg,
        [ids],
        max_tokens=model.tokens(ids, max_tokens),
        sampling=sampling,
        seed=seed,
        end_id=model.tokenizer.eos,
        stop_ids=stop_ids,
        over=(lambda _, new: any(each in model.text(ids, new) for each in stop)) if stop else None,
        turn_tokens=1,
    )
    first = next(under_way)

    def pieces() -> Iterator[str]:
        said = ""
        for done, [new] in itertools.chain([first], under_way):
            text = model.text(ids, new)
            cut = before(text, stop)
            ready = cut if done or len(cut) < len(text) else cut[: _safe(cut, stop)]
            if len(ready) > len(said) and ready.startswith(said):
                yield ready[len(said) :]
                said = ready
            if len(cut) < len(text):
                return

    return pieces()


def _safe(text: str, stop: Sequence[str]) -> int:
    """How much of a text can't change any more."""
    text = text.rstrip(BROKEN)  # bytes that may become a character, and with what is before it a text to stop at
    end = len(text)
    for each in stop:
        for size in range(1, len(each)):
            if text.endswith(each[:size]):
                end = min(end, len(text) - size)
    return end
