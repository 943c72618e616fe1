"""A file's contents as a stream of bytes or lines, decompressed by its suffix, however long it is."""

from __future__ import annotations

import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple, cast

import zstandard

from lm.config import InputError
from lm.data.sources import files
from lm.data.sources.document import MAX_DOCUMENT_BYTES
from lm.data.sources.files import File

BLOCK = 2**20
"""Bytes read at once."""


class Line(NamedTuple):
    """A line without its end, counted from 1, and the bytes of the file gone through with it."""

    number: int
    text: str
    position: int


class Stream:
    """The contents of an open file."""

    def __init__(self, file: File, raw: BinaryIO, data: BinaryIO):
        self.file, self._raw, self._data = file, raw, data

    @property
    def position(self) -> int:
        """Bytes of the file, compressed as it lies, that have been read."""
        return self._raw.tell()

    def blocks(self) -> Iterator[bytes]:
        while block := self._data.read(BLOCK):
            yield block

    def lines(self) -> Iterator[Line]:
        """Lines end in \\n or \\r\\n. A byte-order mark in front of the first is dropped."""
        number = 0
        while data := self._data.readline(MAX_DOCUMENT_BYTES + 1):
            number += 1
            place = f"{self.file.path}, line {number}"
            if len(data) > MAX_DOCUMENT_BYTES:
                raise InputError(f"{place} has more than {MAX_DOCUMENT_BYTES} bytes: split it")
            data = data.removesuffix(b"\n").removesuffix(b"\r")
            if number == 1:
                data = data.removeprefix(b"\xef\xbb\xbf")
            yield Line(number, decoded(data, place), self.position)


@contextlib.contextmanager
def opened(file: File) -> Iterator[Stream]:
    """Opens a file by its suffix: .gz, .xz, .zst, else as it lies.

    Raises:
        InputError: also while reading, where the file can't be read, is damaged or not what its suffix says.
    """
    try:
        with contextlib.ExitStack() as stack:
            raw = stack.enter_context(files.opened(file))
            yield Stream(file, raw, stack.enter_context(_decompressed(file, raw)))
    except (gzip.BadGzipFile, lzma.LZMAError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise InputError(f"{file.path} is damaged or not what its suffix says ({error}): fetch it again") from error
    except files.errors() as error:
        raise InputError(f"{file.path} can't be read: {getattr(error, 'strerror', None) or error}") from error


def decoded(data: bytes | bytearray, place: str, *, offset: int | None = None) -> str:
    """Text from UTF-8; `place` and, where it is known, the `offset` of the data in the file say where it is not."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte 0x{data[error.start]:02x} at offset {(offset or 0) + error.start}"
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise InputError(f"{place} is UTF-16: convert it with iconv -f utf-16 -t utf-8") from error
        raise InputError(
            f"{place} is not UTF-8: {where}; convert it, for instance with iconv -f latin1 -t utf-8"
        ) from error
    if "\0" in text:
        where = "" if offset is None else f" at offset {offset + data.index(0)}"
        raise InputError(
            f"{place} holds a NUL byte{where}: it looks like a binary file or UTF-16; convert text with "
            "iconv -f utf-16 -t utf-8"
        )
    return text


def _decompressed(file: File, raw: BinaryIO) -> BinaryIO:
    if file.suffix == ".gz":
        return _buffered(gzip.GzipFile(fileobj=raw, mode="rb"))
    if file.suffix == ".xz":
        return _buffered(_Frames(raw, lzma.LZMADecompressor))
    if file.suffix == ".zst":
        # Archives are often made with --long=31, which needs leave to use so much memory.
        return _buffered(_Frames(raw, zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj))
    return _buffered(raw) if not file.remote else raw


def _buffered(data: Any) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(data, 2**17))


class _Frames(io.RawIOBase):
    """Compressed data of one frame or several. Python's own readers end silently where a later .xz stream is damaged
    (lzma) or where a .zst file is cut short (zstandard)."""

    # Of zstandard 4 bytes may stand for 128 KB, so this much data is at most 64 MB of text.
    PIECE = 2**11

    def __init__(self, raw: BinaryIO, new_frame: Callable[[], Any]):
        self._raw, self._new_frame = raw, new_frame
        self._frame: Any = None  # between frames
        self._block, self._at = b"", 0
        self._text = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            if self._at == len(self._block):
                self._block, self._at = self._raw.read(2**17), 0
                if not self._block:
                    if self._frame is not None:
                        raise EOFError("it ends in the middle")
                    return 0
            if self._frame is None:
                if self._block[self._at] == 0:  # padding between the streams of an .xz file
                    self._at += 1
                    continue
                self._frame = self._new_frame()
            piece = self._block[self._at : self._at + self.PIECE]
            self._text = memoryview(self._frame.decompress(piece))
            self._at += len(piece)
            if self._frame.eof:
                self._at -= len(self._frame.unused_data)
                self._frame = None
        size = min(len(buffer), len(self._text))
        buffer[:size], self._text = self._text[:size], self._text[size:]
        return size
