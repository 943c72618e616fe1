"""Documents -> ids with all that a store keeps of them: sizes of the raw text, the prompt's ids, a digest.

A long document is cut where that changes no id, so that its parts are encoded beside one another.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lm.data.corpus import Corpus, Document
from lm.data.encoding import Encoded, Encoders
from lm.data.tokenizer import Tokenizer


class Finished(NamedTuple):
    """A document as the store keeps it."""

    name: str
    ids: np.ndarray
    prompt: int
    sizes: tuple[int, int, int, int]
    digest: bytes
    done: int


class _Waiting(NamedTuple):
    """A document whose pieces are being encoded. `joined` words run over from one piece into the next."""

    name: str
    pieces: int
    prompted: bool
    joined: int
    joined_to_prompt: int
    digest: bytes
    done: int


def encoded_documents(
    corpus: Corpus, tokenizer: Tokenizer, first: int, processes: int, batch_characters: int
) -> Iterator[Finished]:
    """The documents from number `first` on, in order; about `batch_characters` of text are encoded at once."""
    waiting: deque[_Waiting] = deque()

    def batches() -> Iterator[list[str]]:
        batch: list[str] = []
        characters = 0
        for document, done in itertools.islice(corpus.scan(), first, None):
            pieces = tokenizer.split_at_cuts(document.text, batch_characters)
            waiting.append(_described(document, pieces, done))
            for piece in [document.prompt, *pieces] if document.prompt else pieces:
                batch.append(piece)
                characters += len(piece)
                if characters >= batch_characters:
                    yield batch
                    batch, characters = [], 0
        if batch:
            yield batch

    with Encoders(tokenizer, processes) as encoders:
        pieces = itertools.chain.from_iterable(encoders.map(batches()))
        for piece in pieces:
            document = waiting.popleft()
            yield _finished(document, [piece, *itertools.islice(pieces, document.pieces - 1)])


def _described(document: Document, pieces: list[str], done: int) -> _Waiting:
    digest = hashlib.sha256()
    for part in (document.id, document.text, document.prompt):
        data = part.encode()
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    joined = sum(_joined(one, two) for one, two in itertools.pairwise(pieces))
    to_prompt = _joined(document.prompt, document.text)
    number = len(pieces) + bool(document.prompt)
    return _Waiting(document.id, number, bool(document.prompt), joined, to_prompt, digest.digest(), done)


def _joined(one: str, two: str) -> bool:
    """Whether a word runs from one text into the next."""
    return bool(one and two) and not one[-1].isspace() and not two[0].isspace()


def _finished(document: _Waiting, pieces: list[Encoded]) -> Finished:
    prompt = pieces[0] if document.prompted else Encoded(np.array([], pieces[0].ids.dtype), 0, 0)
    text = pieces[document.prompted :]
    ids = np.concatenate([prompt.ids, *(piece.ids for piece in text)])
    text_bytes = sum(piece.bytes for piece in text)
    text_words = sum(piece.words for piece in text) - document.joined
    sizes = (text_bytes, text_words, prompt.bytes, prompt.words - document.joined_to_prompt)
    return Finished(document.name, ids, len(prompt.ids), sizes, document.digest, document.done)
