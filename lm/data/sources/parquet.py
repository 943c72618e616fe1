"""Parquet files -> documents: `parquet:GLOB#FIELD`, here or remote, by pyarrow."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from pyarrow import compute, parquet

from lm.config import InputError
from lm.data.sources import document, files
from lm.data.sources.document import Document, Side
from lm.data.sources.files import File
from lm.data.sources.reader import FilesReader, Reading
from lm.data.sources.source import Source
from lm.fields import nearest

BATCH_ROWS = 256
"""Rows in memory at once, besides a page of each column."""


@dataclasses.dataclass(frozen=True)
class Parquet(FilesReader):
    """The text of a column, or a pair's of two; `a.b` is the field b of the struct a. Ids are PATH#ROW, from 0.

    A column holds strings or lists of strings, as `document.of_sides` reads them. A null is no text.
    """

    fields: tuple[str, ...]
    pair_separator: str

    def read(self, file: File) -> Iterator[tuple[Document, int]]:
        with _opened(file) as table:
            schema = table.schema_arrow
            for field in self.fields:
                _check(schema, field, file)
            row = 0
            for batch in table.iter_batches(BATCH_ROWS, columns=list(self.fields), use_threads=False):
                columns = [_texts(batch, field, file, row) for field in self.fields]
                for sides in zip(*columns, strict=True):
                    position = file.size * (row + 1) // table.metadata.num_rows
                    name, place = f"{file.id}#{row}", f"{file.path}, row {row}"
                    yield document.of_sides(name, sides, self.pair_separator, place=place), position
                    row += 1


def reader(source: Source, reading: Reading) -> Parquet:
    found = files.matching(source.base, source.place, example="*.parquet")
    return Parquet(found, source.fields or ("text",), reading.pair_separator if len(source.fields) == 2 else "")


@contextlib.contextmanager
def _opened(file: File) -> Iterator[parquet.ParquetFile]:
    try:
        # Without pre_buffer and with a buffer, columns are read page by page, not a row group at once.
        with contextlib.ExitStack() as stack:
            place = stack.enter_context(files.opened(file)) if file.remote else file.path
            yield stack.enter_context(
                parquet.ParquetFile(place, pre_buffer=False, buffer_size=2**20, page_checksum_verification=True)
            )
    except files.errors(pa.ArrowException) as error:
        raise InputError(f"{file.path} is damaged or no Parquet file ({error}): fetch it again") from error


def _check(schema: pa.Schema, field: str, file: File) -> None:
    columns = dict(_columns(schema))
    if field not in columns:
        raise InputError(
            f"{file.path} has no column {field!r}{nearest(field, columns)}: its columns are "
            f"{', '.join(columns) or 'none'}; name one as #FIELD at the end of the source"
        )
    if (twice := [name for name, _ in _columns(schema)].count(field)) > 1:
        raise InputError(f"{file.path} has {twice} columns named {field!r}: give them different names")
    kind = columns[field]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise InputError(f"{file.path}: the column {field!r} holds {columns[field]}, not strings or lists of them")


def _columns(fields: Any, prefix: str = "") -> Iterator[tuple[str, pa.DataType]]:
    """Columns and their types, those inside structs as a.b."""
    for field in fields:
        yield prefix + field.name, field.type
        if pa.types.is_struct(field.type):
            yield from _columns(field.type, f"{prefix}{field.name}.")


def _texts(batch: pa.RecordBatch, field: str, file: File, row: int) -> list[Side]:
    names = [field] if field in batch.schema.names else field.split(".")
    column = batch.column(names[0])
    for name in names[1:]:
        column = compute.struct_field(column, name)
    try:
        return [_text(value) for value in column.to_pylist()]
    except UnicodeDecodeError as error:
        kind = pa.list_(pa.binary()) if pa.types.is_nested(column.type) else pa.binary()
        bad = next(index for index, value in enumerate(column.cast(kind).to_pylist()) if not _utf8(value))
        raise InputError(f"{file.path}, row {row + bad}: the column {field!r} is not UTF-8") from error


def _text(value: str | list[str | None] | None) -> Side:
    return [text or "" for text in value] if isinstance(value, list) else value or ""


def _utf8(data: bytes | list[bytes | None] | None) -> bool:
    try:
        for one in data if isinstance(data, list) else [data]:
            (one or b"").decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
