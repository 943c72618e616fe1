"""Text files -> documents: `text:GLOB`, plain or compressed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from lm.config import InputError
from lm.data.sources import files, stream
from lm.data.sources.document import MAX_DOCUMENT_BYTES, Document
from lm.data.sources.files import File
from lm.data.sources.reader import FilesReader, Reading
from lm.data.sources.source import Source


@dataclasses.dataclass(frozen=True)
class Text(FilesReader):
    """Text exactly as it stands, without newline translation: one document a file, or several with a separator.

    With a separator `#N` counts a file's documents from 0; what is empty between two separators is no document.
    """

    separator: str | None

    def ids(self) -> Iterator[str] | None:
        return (file.id for file in self.files) if self.separator is None else None

    def read(self, file: File) -> Iterator[tuple[Document, int]]:
        with stream.opened(file) as contents:
            pieces = _whole(contents) if self.separator is None else _pieces(contents, self.separator.encode())
            for number, (offset, data) in enumerate(pieces):
                name = file.id if self.separator is None else f"{file.id}#{number}"
                yield Document(name, stream.decoded(data, file.path, offset=offset)), contents.position


def reader(source: Source, reading: Reading) -> Text:
    if reading.document_separator == "":
        raise InputError("data.document_separator is empty: use None for one document a file")
    return Text(files.matching(source.base, source.place, example="*.txt"), reading.document_separator)


def _whole(contents: stream.Stream) -> Iterator[tuple[int, bytearray]]:
    data = bytearray()
    for block in contents.blocks():
        data += block
        if len(data) > MAX_DOCUMENT_BYTES:
            raise InputError(
                f"{contents.file.path} has more than {MAX_DOCUMENT_BYTES} bytes of text, too many for one document: "
                "split the file, or set data.document_separator"
            )
    yield 0, data


def _pieces(contents: stream.Stream, separator: bytes) -> Iterator[tuple[int, bytearray]]:
    """What stands between separators and isn't empty, with its offset. No character's UTF-8 lies within another's, so
    bytes may be split before they are decoded."""
    data, dropped, searched = bytearray(), 0, 0
    for block in contents.blocks():
        data += block
        start = 0
        while (end := data.find(separator, searched)) >= 0:
            if end > start:
                yield dropped + start, data[start:end]
            start = searched = end + len(separator)
        del data[:start]
        dropped += start
        searched = max(0, len(data) - len(separator) + 1)
        if len(data) > MAX_DOCUMENT_BYTES:
            raise InputError(
                f"{contents.file.path} has more than {MAX_DOCUMENT_BYTES} bytes without the separator from offset "
                f"{dropped} on: split them, or set another data.document_separator"
            )
    if data:
        yield dropped, data
