"""Writing a token store: documents are encoded in parallel and appended in order, and a journal says how far it came.

A store is a folder of plain arrays (`lm/data/tokens.py` reads them) and a `store.json` that describes them. Until that
is written, `journal.json` holds the sizes up to which all files belong together: whatever was appended after it by a
build that was killed is cut off again, and the build goes on from there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lm.config import InputError
from lm.data.column import write_index
from lm.data.corpus import Corpus
from lm.data.measuring import Finished, encoded_documents
from lm.data.tokenizer import Tokenizer

FORMAT_VERSION = 2
DESCRIBED = ("fingerprint", "corpus_sha256", "bos", "eos", "dtype", "documents", "tokens", "skipped", "files")
DESCRIPTION, JOURNAL = "store.json", "journal.json"
BATCH_CHARACTERS = 2**20
"""Text encoded at once: enough to be worth a process's while, little memory."""
JOURNAL_CHARACTERS = 2**26
"""Text between two entries of the journal: what a kill loses at most."""
SMALL_BYTES = 2**24
"""A corpus up to this is encoded in this process: starting others takes longer."""
PROMPT_FILES = ("prompts.bin", "prompt_bytes.bin", "prompt_words.bin")
FILES = ("ids.bin", "offsets.bin", "names.bin", "name_ends.bin", "bytes.bin", "words.bin", *PROMPT_FILES)


@dataclasses.dataclass
class Journal:
    """How far a build has come. `digest` chains the documents' own, so that it can be gone on with."""

    fingerprint: str
    documents: int = 0
    tokens: int = 0
    characters: int = 0
    prompted: bool = False
    digest: str = ""
    sizes: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(FILES, 0))


def write(
    directory: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    fingerprint: str,
    processes: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Fills `directory` with the store of a corpus, going on from what an earlier build left there."""
    journal = _resumed(directory, fingerprint)
    try:
        _append(directory, corpus, tokenizer, journal, processes, progress)
    except InputError:
        if not (directory / JOURNAL).exists():  # there is nothing to go on with
            shutil.rmtree(directory, ignore_errors=True)
        raise
    describe(
        directory,
        journal,
        id_dtype(tokenizer),
        tokenizer.bos,
        tokenizer.eos,
        corpus_sha256=journal.digest,
        skipped=corpus.skipped,
    )


def _append(
    directory: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    journal: Journal,
    processes: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Appends all documents that the journal doesn't have yet."""
    written = journal.characters
    with _Appender(directory, journal, tokenizer) as store:
        workers = processes if corpus.size > SMALL_BYTES else 1
        for document in encoded_documents(corpus, tokenizer, journal.documents, workers, BATCH_CHARACTERS):
            store.append(document)
            if progress is not None:
                progress(document.done, corpus.size)
            if journal.characters - written >= JOURNAL_CHARACTERS:
                _check_unchanged(corpus)
                store.commit()
                written = journal.characters
        _check_unchanged(corpus)
        store.commit()


def _check_unchanged(corpus: Corpus) -> None:
    """Nothing is kept of a text that isn't the one the store's name was made of."""
    if corpus.changed():
        raise InputError(f"{corpus.source} was changed while it was read: start again")


def describe(
    directory: Path,
    journal: Journal,
    dtype: np.dtype,
    bos: int | None,
    eos: int | None,
    *,
    corpus_sha256: str,
    skipped: int,
) -> None:
    """Ends a build: the last offset, the index, and the description in the journal's place."""
    with (directory / "offsets.bin").open("ab") as file:
        np.array([journal.tokens], np.int64).tofile(file)
    write_index(directory / "offsets.bin", journal.documents + 1)
    left_out = () if journal.prompted else PROMPT_FILES
    described = {
        "fingerprint": journal.fingerprint,
        "corpus_sha256": corpus_sha256,
        "bos": bos,
        "eos": eos,
        "dtype": dtype.str,
        "documents": journal.documents,
        "tokens": journal.tokens,
        "skipped": skipped,
        "files": {
            path.name: path.stat().st_size for path in sorted(directory.glob("*.bin*")) if path.name not in left_out
        },
    }
    with (directory / DESCRIPTION).open("w", encoding="utf-8") as file:
        json.dump(described, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    (directory / JOURNAL).unlink(missing_ok=True)
    for name in left_out:
        (directory / name).unlink(missing_ok=True)


def id_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The smallest unsigned type that holds every id."""
    return np.min_scalar_type(tokenizer.vocab_size - 1)


def _resumed(directory: Path, fingerprint: str) -> Journal:
    """The journal of a build that was cut short, its files cut back to it; else an empty one in an empty folder."""
    try:
        journal = Journal(**json.loads((directory / JOURNAL).read_text(encoding="utf-8")))
        if journal.fingerprint == fingerprint:
            (directory / DESCRIPTION).unlink(missing_ok=True)
            for name, size in journal.sizes.items():
                if (directory / name).stat().st_size < size:
                    raise ValueError(f"{name} is shorter than the journal says")
                os.truncate(directory / name, size)
            return journal
    except (OSError, ValueError, TypeError):
        pass  # nothing there, or nothing that can be gone on with
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    return Journal(fingerprint)


class _Appender:
    """The files of a store that grows, and its journal."""

    def __init__(self, directory: Path, journal: Journal, tokenizer: Tokenizer):
        self.directory, self.journal = directory, journal
        dtype = id_dtype(tokenizer)
        self._head = np.array([] if tokenizer.bos is None else [tokenizer.bos], dtype)
        self._tail = np.array([] if tokenizer.eos is None else [tokenizer.eos], dtype)
        self._files: dict[str, BinaryIO] = {}
        self._names_end = journal.sizes["names.bin"]

    def __enter__(self) -> _Appender:
        for name in FILES:
            self._files[name] = (self.directory / name).open("ab", buffering=2**18)
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def append(self, document: Finished) -> None:
        journal, name = self.journal, document.name.encode()
        ids = np.concatenate([self._head, document.ids, self._tail])
        self._names_end += len(name)
        prompt = len(self._head) + document.prompt if document.prompt else 0
        self._files["ids.bin"].write(ids.tobytes())
        self._files["names.bin"].write(name)
        self._files["offsets.bin"].write(np.int64(journal.tokens).tobytes())
        self._files["name_ends.bin"].write(np.int64(self._names_end).tobytes())
        columns = ("bytes.bin", "words.bin", "prompt_bytes.bin", "prompt_words.bin", "prompts.bin")
        for column, value in zip(columns, (*document.sizes, prompt), strict=True):
            self._files[column].write(np.int32(value).tobytes())
        journal.documents += 1
        journal.tokens += len(ids)
        journal.characters += document.sizes[0] + document.sizes[2]
        journal.prompted |= prompt > 0
        journal.digest = hashlib.sha256(bytes.fromhex(journal.digest) + document.digest).hexdigest()

    def commit(self) -> None:
        """What is appended up to here is kept, whatever happens next."""
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            self.journal.sizes[name] = file.tell()
        scratch = self.directory / f".{JOURNAL}"
        scratch.write_text(json.dumps(dataclasses.asdict(self.journal)), encoding="utf-8")
        scratch.replace(self.directory / JOURNAL)
