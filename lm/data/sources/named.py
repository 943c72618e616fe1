"""The files on this machine that sources of text name, without opening any."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from lm.config import InputError
from lm.data.sources.source import parse, parse_named


def named_files(sources: Iterable[str]) -> Iterator[Path]:
    """Those of each source, nothing for one that isn't written as one."""
    for written in sources:
        try:
            components = parse(parse_named(written)[1])
        except InputError:
            continue
        for component in components:
            for pattern in _patterns(component.source.kind, component.source.place):
                yield from map(Path, glob.glob(os.path.expanduser(pattern), recursive=True))  # noqa: PTH111, PTH207


def _patterns(kind: str, place: str) -> list[str]:
    """What may be a file's name: of two files with a comma between each too."""
    if kind in ("builtin", "tfds") or "://" in place:
        return []
    return [place, glob.escape(place), *(place.split(",") if kind == "lines" else ())]
