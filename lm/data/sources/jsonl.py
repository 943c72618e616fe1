"""JSON lines -> documents: `jsonl:GLOB#FIELD`, an object a line, plain or compressed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from lm.config import InputError
from lm.data.sources import document, files, stream
from lm.data.sources.document import Document, Side
from lm.data.sources.files import File
from lm.data.sources.reader import FilesReader, Reading
from lm.data.sources.source import Source
from lm.fields import nearest


@dataclasses.dataclass(frozen=True)
class JsonLines(FilesReader):
    """The text of a field, or a pair's of two; `a.b` is the field b of the object a. Ids are PATH#LINE.

    A field is a string or a list of strings, as `document.of_sides` reads it.
    """

    fields: tuple[str, ...]
    pair_separator: str

    def read(self, file: File) -> Iterator[tuple[Document, int]]:
        with stream.opened(file) as contents:
            for line in contents.lines():
                if not line.text.strip():
                    continue
                place = f"{file.path}, line {line.number}"
                record = _record(line.text, place)
                sides = [_text(record, field, place) for field in self.fields]
                name = f"{file.id}#{line.number}"
                yield document.of_sides(name, sides, self.pair_separator, place=place), line.position


def reader(source: Source, reading: Reading) -> JsonLines:
    found = files.matching(source.base, source.place, example="*.jsonl")
    return JsonLines(found, source.fields or ("text",), reading.pair_separator if len(source.fields) == 2 else "")


def _record(line: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line, parse_int=lambda digits: int(digits[:20]))  # longer ones Python may refuse
    except (ValueError, RecursionError) as error:
        hint = "; jsonl: wants one object a line, not one long list" if line.lstrip().startswith("[") else ""
        raise InputError(f"{place} is not JSON: {error}{hint}") from error
    if not isinstance(record, dict):
        raise InputError(f"{place} is not a JSON object with fields but {type(record).__name__}")
    return record


def _text(record: dict[str, Any], field: str, place: str) -> Side:
    value: Any = record
    if field in record:
        value = record[field]
    else:
        for part in field.split("."):
            if not isinstance(value, dict) or part not in value:
                there = ", ".join(_names(record)) or "none"
                raise InputError(
                    f"{place} has no field {field!r}{nearest(field, _names(record))}: its fields are {there}; name one "
                    "as #FIELD at the end of the source"
                )
            value = value[part]
    strings = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str) for one in strings):
        raise InputError(f"{place}: the field {field!r} is {json.dumps(value)[:40]}, not a string or a list of strings")
    for one in strings:
        _check_characters(one, field, place)
    return value


def _check_characters(text: str, field: str, place: str) -> None:
    """JSON can write half of a character, "\\ud800", which is no text."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place}: the field {field!r} holds {ascii(text[error.start])}, half of a surrogate pair, at its "
            f"character {error.start}: leave it out"
        ) from error


def _names(record: dict[str, Any]) -> list[str]:
    """The fields, those of objects inside as a.b."""
    inside = [f"{name}.{inner}" for name, value in record.items() if isinstance(value, dict) for inner in value]
    return [*record, *inside]
