"""Parallel text -> documents: `pairs:GLOB.tsv`, columns of a file, or `pairs:SOURCE_FILE,TARGET_FILE`, line by line."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from lm.config import InputError
from lm.data.sources import document, files, stream
from lm.data.sources.document import Document
from lm.data.sources.files import File
from lm.data.sources.reader import FilesReader, Reader, Reading
from lm.data.sources.source import Source


@dataclasses.dataclass(frozen=True)
class TabSeparated(FilesReader):
    """Source TAB target; further columns are ignored, blank lines skipped. Nothing is quoted. Ids are PATH#LINE."""

    pair_separator: str

    def read(self, file: File) -> Iterator[tuple[Document, int]]:
        with stream.opened(file) as contents:
            for line in contents.lines():
                if not line.text.strip():
                    continue
                sides = line.text.split("\t", 2)[:2]
                place = f"{file.path}, line {line.number}"
                if len(sides) < 2:
                    raise InputError(f"{place} has no TAB between source and target: {line.text[:40]!r}")
                name = f"{file.id}#{line.number}"
                yield document.of_sides(name, sides, self.pair_separator, place=place), line.position


@dataclasses.dataclass(frozen=True)
class TwoFiles(Reader):
    """Line N of one file and line N of the other. Ids are those of the first file's lines, PATH#LINE."""

    first: File
    second: File
    pair_separator: str

    @property
    def size(self) -> int:
        return self.first.size + self.second.size

    def contents(self) -> list[object]:
        return ["TwoFiles", self.pair_separator, self.first.id, *map(files.digest, (self.first, self.second))]

    def scan(self) -> Iterator[tuple[Document, int]]:
        with stream.opened(self.first) as first, stream.opened(self.second) as second:
            lines = itertools.zip_longest(first.lines(), second.lines())
            for number, (source, target) in enumerate(lines, 1):
                if source is None or target is None:
                    rest = 1 + sum(1 for _ in lines)  # one of the two has ended
                    counts = (number - 1, number - 1 + rest) if source is None else (number - 1 + rest, number - 1)
                    raise InputError(
                        f"{self.first.path} has {counts[0]} lines and {self.second.path} has {counts[1]}: line N of "
                        "one must be the translation of line N of the other"
                    )
                name, sides = f"{self.first.id}#{number}", (source.text, target.text)
                place = f"line {number} of {self.first.path} and {self.second.path}"
                position = min(source.position, self.first.size) + min(target.position, self.second.size)
                yield document.of_sides(name, sides, self.pair_separator, place=place), position


def tsv(source: Source, reading: Reading) -> TabSeparated:
    return TabSeparated(files.matching(source.base, source.place, example="*.tsv"), reading.pair_separator)


def lines(source: Source, reading: Reading) -> TwoFiles:
    sides = []
    for place in source.place.split(","):
        found = files.matching(f"pairs:{place}", place, example="*")
        if len(found) > 1:
            raise InputError(f"{source.base}: {place} matches {len(found)} files, not one: name the file")
        sides.append(found[0])
    return TwoFiles(sides[0], sides[1], reading.pair_separator)
