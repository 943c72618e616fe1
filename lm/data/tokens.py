"""Tokenise once: the ids of a corpus as one stream on disk, kept under a fingerprint of its contents and its tokenizer.

Shapes: D documents.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lm.config import InputError
from lm.cores import usable_cores
from lm.data import cache, marks, store
from lm.data.column import Column, SortedColumn, allow_open_files
from lm.data.corpus import Corpus
from lm.data.sources.token_files import TokenFiles
from lm.data.tokenizer import Tokenizer

Progress = Callable[[int, int], None]
BUILDING = ".building"
"""Ends the name of the folder in which a store is made."""


class Sizes(NamedTuple):
    """Of a document's raw text: UTF-8 bytes and whitespace-separated words, of its prompt and of what follows."""

    bytes: int
    words: int
    prompt_bytes: int = 0
    prompt_words: int = 0


class TokenStore:
    """The ids of all documents in a row, each as [BOS] prompt text [EOS] as far as there are these.

    Nothing that grows with the corpus is held in memory, and everything is read where it lies when it is asked for.

    Attributes:
        source: the text, as the corpus was asked for; another source with the same contents shares the store.
        fingerprint: names corpus contents and tokenizer.
        corpus_sha256: of the documents' ids and texts alone.
        num_tokens: ids in the stream, BOS and EOS included.
        offsets: int64 [D + 1], where each document starts in the stream and, last, where the stream ends.
        prompts: int32 [D], how many ids of each document, BOS included, are its prompt. None: no document has one.
        skipped: documents without text, left out.
    """

    def __init__(self, directory: Path, *, source: str, tokenizer: Tokenizer, shards: Sequence[Column] | None = None):
        described = _described(directory)
        self.directory, self.source, self._tokenizer = directory, source, tokenizer
        self.fingerprint: str = described["fingerprint"]
        self.corpus_sha256: str = described["corpus_sha256"]
        self.bos: int | None = described["bos"]
        self.eos: int | None = described["eos"]
        self.num_tokens: int = described["tokens"]
        self.skipped: int = described["skipped"]
        self._documents: int = described["documents"]
        self.offsets = SortedColumn(directory / "offsets.bin", self._documents + 1)

        def column(name: str, dtype: Any, size: int = self._documents) -> Column | None:
            return Column(directory / name, dtype, size) if name in described["files"] else None

        self.prompts = column("prompts.bin", np.int32)
        self._sizes = [column(f"{name}.bin", np.int32) for name in Sizes._fields]
        self._names = Column(directory / "names.bin", np.uint8, described["files"]["names.bin"])
        self._name_ends = Column(directory / "name_ends.bin", np.int64, self._documents)
        self._shards = list(shards or [Column(directory / "ids.bin", np.dtype(described["dtype"]), self.num_tokens)])
        self._shard_ends = np.cumsum([len(shard) for shard in self._shards]).tolist()

    def __len__(self) -> int:
        return self._documents

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids start..stop of the stream, in an unsigned integer type."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise _damaged(self.directory, f"ids {start} to {stop} of {self.num_tokens} are asked for")
        pieces = []
        while True:
            shard = min(bisect.bisect_right(self._shard_ends, start), len(self._shards) - 1)
            end = self._shard_ends[shard]
            before = end - len(self._shards[shard])
            pieces.append(self._shards[shard][start - before : min(stop, end) - before])
            start = end
            if start >= stop:
                return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def document(self, index: int) -> np.ndarray:
        """One document's ids without BOS and EOS."""
        start, stop = self.offsets[index : index + 2].tolist()
        ids = self.read(start, stop)
        if self.bos is not None and len(ids) and ids[0] == self.bos:
            ids = ids[1:]
        return ids[:-1] if self.eos is not None and len(ids) and ids[-1] == self.eos else ids

    def document_id(self, index: int) -> str:
        """The name that a document has in its source."""
        index = range(len(self))[index]
        start = int(self._name_ends[index - 1]) if index else 0
        return self._names[start : int(self._name_ends[index])].tobytes().decode()

    def sizes(self, index: int) -> Sizes:
        """Bytes and words of one document; of ready ids those of the text that they decode to."""
        if self._sizes[0] is not None:
            return Sizes(*(0 if column is None else int(column[index]) for column in self._sizes))
        text = self._tokenizer.decode(self.document(index))
        return Sizes(len(text.encode()), len(text.split()))


def tokenize(
    corpus: Corpus | TokenFiles,
    tokenizer: Tokenizer,
    *,
    processes: int | None = None,
    progress: Progress | None = None,
) -> TokenStore:
    """The corpus's ids, from the cache or made now.

    A store that was made of other contents, by another tokenizer or by another version of this code has another
    fingerprint. One that is being made by another process is waited for; one whose making was cut short is made on from
    there.

    Args:
        processes: that tokenise. None: as many as there are cores.
        progress: called with the bytes of the source gone through and all its bytes.

    Raises:
        InputError: bad text, with its place; no text; a full disk; a store that has been damaged since it was made.
    """
    kind = [tokenizer.sha256, tokenizer.library_version, tokenizer.bos, tokenizer.eos]
    recipe = json.dumps([store.FORMAT_VERSION, corpus.key, *kind])
    fingerprint = hashlib.sha256(recipe.encode()).hexdigest()
    folder = cache.directory("tokens")
    directory = folder / fingerprint[:32]
    if not directory.exists():
        lock = folder / f".{directory.name}.lock"
        with cache.locked(lock) as alone:
            if not directory.exists():  # another process may have made it while this one waited
                cache.clear_leftovers(folder, BUILDING)
                _make(directory, corpus, tokenizer, fingerprint, processes or usable_cores(), progress, alone)
            lock.unlink(missing_ok=True)  # who waits on it finds the store
    shards = None
    if isinstance(corpus, TokenFiles) and corpus.split is None:
        allow_open_files(len(corpus.files))
        shards = [Column(file.path, file.dtype, file.size, offset=file.offset) for file in corpus.files]
    return TokenStore(directory, source=corpus.source, tokenizer=tokenizer, shards=shards)


def _make(
    directory: Path,
    corpus: Corpus | TokenFiles,
    tokenizer: Tokenizer,
    fingerprint: str,
    processes: int,
    progress: Progress | None,
    alone: bool,
) -> None:
    """Makes a store beside its place, which a rename then gives it: there it is complete or not at all.

    Only one that is surely `alone` goes on from what another left. On some shared file systems (Lustre's localflock)
    a lock holds on one machine alone: so each machine has a folder of its own.
    """
    scratch = directory.with_name(f".{directory.name}-{platform.node()}{BUILDING}")
    try:
        with contextlib.nullcontext(scratch) if alone else cache.building(directory) as folder:
            if isinstance(corpus, TokenFiles):
                marks.write(folder, corpus, tokenizer, fingerprint, progress)
            else:
                store.write(folder, corpus, tokenizer, fingerprint, processes, progress)
        if alone:
            cache.give_place(scratch, directory)
    except OSError as error:
        raise InputError(
            f"the token store of {corpus.source} can't be written under {scratch.parent}: {error.strerror}; make room, "
            "and the same command goes on from where it was, or set LM_CACHE to another folder"
        ) from error


def _described(directory: Path) -> dict[str, Any]:
    """What a store says of itself. Raises InputError where a file of it has not the size it was written with."""
    try:
        described = json.loads((directory / store.DESCRIPTION).read_text(encoding="utf-8"))
        sizes = {name: ((directory / name).stat().st_size, size) for name, size in described["files"].items()}
        missing = {*store.DESCRIBED} - described.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(directory, f"a file of it is missing or can't be read ({error})") from error
    if missing:
        raise _damaged(directory, f"{store.DESCRIPTION} lacks {', '.join(sorted(missing))}")
    for name, (found, size) in sizes.items():
        if found != size:
            raise _damaged(directory, f"{name} has {found} bytes, not the {size} it was written with")
    return described


def _damaged(directory: Path, what: str) -> InputError:
    return InputError(
        f"the token store {directory} is damaged: {what}; delete the folder and start again, it is then made anew"
    )
