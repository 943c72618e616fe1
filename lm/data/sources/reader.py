"""What reads one kind of source: documents in order, as they lie. `corpus.READERS` lists the kinds."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from lm.data.sources import files
from lm.data.sources.document import Document
from lm.data.sources.files import File


class Reading(NamedTuple):
    """How sources are read, as far as the source itself doesn't say it."""

    document_separator: str | None = None
    pair_separator: str = "\n"


class Reader(abc.ABC):
    """The documents of a source, empty ones too. Cheap to make and to pickle: it opens nothing that it keeps."""

    splits: tuple[str, ...] = ()
    """The splits that a dataset brings itself; text in files has none."""

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """Bytes on disk that a scan goes through."""

    @abc.abstractmethod
    def contents(self) -> list[Any]:
        """What decides the documents, as JSON: hashes of the files and how they are read."""

    @abc.abstractmethod
    def scan(self) -> Iterator[tuple[Document, int]]:
        """The documents in order, each with the bytes of `size` gone through so far."""

    def ids(self) -> Iterator[str] | None:
        """The ids of the documents, where they are known without reading them."""
        return None

    def of_split(self, split: str) -> Reader:
        """Another of the dataset's own splits."""
        raise AssertionError(f"{self} has no splits")


@dataclasses.dataclass(frozen=True)
class FilesReader(Reader):
    """A source whose documents lie in files, each on its own. Further fields say how they are read."""

    files: tuple[File, ...]

    @abc.abstractmethod
    def read(self, file: File) -> Iterator[tuple[Document, int]]:
        """The documents of one file, each with the bytes of the file gone through so far."""

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def contents(self) -> list[Any]:
        how = [getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "files"]
        return [type(self).__name__, how, [[file.id, files.digest(file)] for file in self.files]]

    def scan(self) -> Iterator[tuple[Document, int]]:
        before = 0
        for file in self.files:
            for document, position in self.read(file):
                yield document, before + min(position, file.size)
            before += file.size
