"""Tokenise once: the ids of a corpus in one memory-mapped file, kept under the fingerprints of corpus and tokenizer.

Shapes: D documents.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from lm.config import InputError
from lm.data import cache
from lm.data.corpus import Corpus
from lm.data.tokenizer import Tokenizer

FORMAT_VERSION = 1
BATCH_CHARACTERS = 2**20
"""Text tokenised at once: enough for all cores, little memory."""


class TokenStore:
    """The ids of all documents in a row, each as [BOS] ids [EOS] as far as the tokenizer has these.

    Attributes:
        source: the text, as the corpus was asked for; another source with the same contents shares the store.
        ids: the whole stream, memory-mapped, in the smallest unsigned type that holds the vocabulary.
        offsets: int64 [D + 1], where each document starts and, last, where the stream ends.
        bytes_D, words_D: int64, UTF-8 bytes and whitespace-separated words of each document's raw text.
        bos, eos: whether each document has one.
        fingerprint: names corpus contents and tokenizer.
        corpus_sha256: the corpus's own fingerprint.
    """

    def __init__(self, directory: Path, *, source: str):
        described = json.loads((directory / "store.json").read_text(encoding="utf-8"))
        self.source = source
        self.fingerprint: str = described["fingerprint"]
        self.corpus_sha256: str = described["corpus_sha256"]
        self.bos: bool = described["bos"]
        self.eos: bool = described["eos"]
        self.document_ids: list[str] = described["document_ids"]
        self.offsets = np.load(directory / "offsets.npy")
        self.bytes_D = np.load(directory / "bytes.npy")
        self.words_D = np.load(directory / "words.npy")
        self.ids = _mapped(directory / "ids.bin", np.dtype(described["dtype"]), self.num_tokens)

    @property
    def num_tokens(self) -> int:
        """Ids in the stream, BOS and EOS included."""
        return int(self.offsets[-1])

    def __len__(self) -> int:
        return len(self.document_ids)

    def document(self, index: int) -> np.ndarray:
        """One document's ids without BOS and EOS."""
        return self.ids[self.offsets[index] + self.bos : self.offsets[index + 1] - self.eos]


def tokenize(corpus: Corpus, tokenizer: Tokenizer, *, progress: Callable[[int, int], None] | None = None) -> TokenStore:
    """The corpus's ids, from the cache or made now.

    Args:
        progress: called with the documents done and all documents.
    """
    recipe = json.dumps([FORMAT_VERSION, corpus.fingerprint, tokenizer.sha256])
    fingerprint = hashlib.sha256(recipe.encode()).hexdigest()
    directory = cache.directory("tokens") / fingerprint[:32]
    if not directory.exists():
        with cache.building(directory) as scratch:
            _write(scratch, corpus, tokenizer, fingerprint, progress)
    return TokenStore(directory, source=corpus.source)


def _write(
    directory: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    fingerprint: str,
    progress: Callable[[int, int], None] | None,
) -> None:
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    head = np.array([] if tokenizer.bos is None else [tokenizer.bos], dtype)
    tail = np.array([] if tokenizer.eos is None else [tokenizer.eos], dtype)
    ends, sizes, words = [0], [], []
    with (directory / "ids.bin").open("wb") as file:
        for texts in _batches(corpus):
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                document = np.concatenate([head, ids.astype(dtype), tail])
                document.tofile(file)
                ends.append(ends[-1] + len(document))
                sizes.append(len(text.encode()))
                words.append(len(text.split()))
            if progress is not None:
                progress(len(sizes), len(corpus))
    if not sum(sizes):
        raise InputError(f"{corpus.source} has no text: its {len(corpus)} documents are empty")
    np.save(directory / "offsets.npy", np.array(ends, np.int64))
    np.save(directory / "bytes.npy", np.array(sizes, np.int64))
    np.save(directory / "words.npy", np.array(words, np.int64))
    described = {
        "fingerprint": fingerprint,
        "corpus_sha256": corpus.fingerprint,
        "bos": bool(len(head)),
        "eos": bool(len(tail)),
        "dtype": dtype.str,
        "document_ids": list(corpus.ids),
    }
    (directory / "store.json").write_text(json.dumps(described), encoding="utf-8")


def _batches(corpus: Corpus) -> Iterator[list[str]]:
    """The texts in order, about `BATCH_CHARACTERS` at a time."""
    texts: list[str] = []
    size = 0
    for document in corpus:
        texts.append(document.text)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def _mapped(path: Path, dtype: np.dtype, size: int) -> np.ndarray:
    """A read-only memory map of a file of ids. Rows are read in random order: the kernel is told not to read ahead."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, dtype, size)
