"""Training a BPE: on bytes, or on characters with byte tokens for those that are rare."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lm.config import MOST_TOKENS, InputError
from lm.data.sources.token_files import TokenFiles
from lm.data.tokenizers.file_tokenizer import FileTokenizer
from lm.data.tokenizers.special_ids import BOS, EOS
from lm.data.tokenizers.split_patterns import PIECES

COVERAGE = 0.9995
"""With byte fallback: the part of a text's characters that have tokens of their own, as in SentencePiece."""


LONGEST_PIECE = 10_000
"""In characters, in training: a longer run without, or of, white space is cut."""
_LONG_RUN = re.compile(rf"\S{{{LONGEST_PIECE},}}|\s{{{LONGEST_PIECE},}}")


class Documents(Protocol):
    """What training needs of a corpus."""

    @property
    def size(self) -> int: ...

    def scan(self) -> Iterator[tuple[Any, int]]: ...


def train_tokenizer(
    corpora: Sequence[Documents | TokenFiles],
    vocab_size: int,
    *,
    byte_fallback: bool = False,
    special_tokens: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> FileTokenizer:
    """Trains a BPE on all documents of some corpora, each counted once. `progress` gets (bytes read, bytes in all).

    The memory grows with the number of different pieces in the text, not with its length.
    """
    if ready := [corpus.source for corpus in corpora if isinstance(corpus, TokenFiles)]:
        raise InputError(
            f"{ready[0]} is ready ids, which have no text to train a BPE on: set tokenizer.kind to file and "
            "tokenizer.path to the tokenizer that they were made with"
        )
    readable = [corpus for corpus in corpora if not isinstance(corpus, TokenFiles)]
    texts = _Texts(readable, progress, passes=2 if byte_fallback else 1)
    return train_bpe(texts, vocab_size, byte_fallback=byte_fallback, special_tokens=special_tokens)


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, byte_fallback: bool = False, special_tokens: Sequence[str] = ()
) -> FileTokenizer:
    """Trains a BPE: any text comes back exactly from its ids.

    Ids in order: the 256 bytes, with byte_fallback the frequent characters, the merges, `special_tokens`, BOS, EOS. A
    text with few different words has fewer merges than there is room for.

    Args:
      texts: gone through once; with byte_fallback twice, so then not an iterator.
      byte_fallback: tokens are characters of the text, white space included, and a character without a token is the
        tokens of its bytes, `<0xF0>`. Otherwise tokens are bytes.
    """
    special = [*special_tokens, BOS, EOS]
    if "" in special or len(set(special)) < len(special):
        raise InputError(f"special tokens {special_tokens} must be different, not empty, and not {BOS} or {EOS}")
    if vocab_size >= MOST_TOKENS:
        raise InputError(f"a vocabulary of {vocab_size} is too large: use fewer than {MOST_TOKENS:,}")
    room = vocab_size - len(special)
    if room < 256:
        raise InputError(
            f"a vocabulary of {vocab_size} is too small: the bytes and {len(special)} special tokens need at least "
            f"{256 + len(special)}"
        )
    tokenizer = _train_on_characters(texts, room) if byte_fallback else _train_on_bytes(texts, room)
    if clash := [name for name in special if tokenizer.token_to_id(name) is not None]:
        raise InputError(f"special token {clash[0]!r} is a word of the text too: give it a name such as <|{clash[0]}|>")
    tokenizer.add_special_tokens(special)
    return FileTokenizer(tokenizer.to_str(), "bpe")


def _train_on_bytes(texts: Iterable[str], room: int) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=room, initial_alphabet=alphabet, show_progress=False)
    _train(tokenizer, texts, trainer)
    return tokenizer


def _train_on_characters(texts: Iterable[str], room: int) -> tokenizers.Tokenizer:
    """No piece of PIECES holds a whole `<0x41>` (its `>` is a piece of its own), so text never makes a byte token."""
    assert iter(texts) is not texts, "the first pass would leave nothing for the second"
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    alphabet = _alphabet(texts, (room - 256) // 2)
    trainer = trainers.BpeTrainer(
        vocab_size=room,
        special_tokens=[f"<0x{byte:02X}>" for byte in range(256)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    _train(tokenizer, texts, trainer)
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = []  # the trainer's way to put tokens first; they are no special ones
    described["model"]["byte_fallback"] = True
    return tokenizers.Tokenizer.from_str(json.dumps(described))


def _train(tokenizer: tokenizers.Tokenizer, texts: Iterable[str], trainer: trainers.BpeTrainer) -> None:
    """Trains in a thread: the library looks for no signals, and Ctrl-C is to end this at once."""
    failed: list[BaseException] = []

    def train() -> None:
        try:
            tokenizer.train_from_iterator((part for text in texts for part in _bounded(text)), trainer)
        except BaseException as error:  # raised again below
            failed.append(error)

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if failed:
        raise failed[0]


def _bounded(text: str) -> Iterator[str]:
    """A text in parts, without pieces longer than LONGEST_PIECE: the trainer needs their length squared."""
    start = 0
    for run in _LONG_RUN.finditer(text):
        yield text[start : run.start()]
        yield from (text[at : at + LONGEST_PIECE] for at in range(run.start(), run.end(), LONGEST_PIECE))
        start = run.end()
    yield text[start:]


def _alphabet(texts: Iterable[str], most: int) -> list[str]:
    """The most frequent characters, to COVERAGE of the text and at most so many; of equals the lower code points."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    left = COVERAGE * counts.total()
    chosen: list[str] = []
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if left <= 0 or len(chosen) == most:
            break
        chosen.append(character)
        left -= count
    return chosen


class _Texts:
    """The texts of some corpora, as often as they are asked for, with a report on how far they have been read."""

    def __init__(self, corpora: Sequence[Documents], progress: Callable[[int, int], None] | None, passes: int):
        self._corpora, self._progress = corpora, progress
        self._before = 0
        self._total = passes * sum(corpus.size for corpus in corpora)

    def __iter__(self) -> Iterator[str]:
        for corpus in self._corpora:
            for document, done in corpus.scan():
                yield document.prompt + document.text
                if self._progress is not None:
                    self._progress(self._before + done, self._total)
            self._before += corpus.size
