"""A corpus of texts held in memory."""

from __future__ import annotations

import dataclasses

from lm.data.corpus import Corpus, Document
from lm.data.sources.reader import Reader


@dataclasses.dataclass(frozen=True)
class Memory(Reader):
    documents: tuple[Document, ...]

    @property
    def size(self):
        return sum(len((document.prompt + document.text).encode()) for document in self.documents)

    def contents(self):
        return ["Memory", self.documents]

    def scan(self):
        position = 0
        for document in self.documents:
            position += len((document.prompt + document.text).encode())
            yield document, position


def corpus_of(*texts: str | Document, source: str = "memory") -> Corpus:
    """Texts become the documents doc0, doc1, ...; a Document is taken as it is."""
    documents = (Document(f"doc{n}", text) if isinstance(text, str) else text for n, text in enumerate(texts))
    return Corpus(source, Memory(tuple(documents)))
