"""What commands write where the user says: checked before any work is done, and there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from lm.config import InputError


def writable_file(flag: str, path: str, *, read: Iterable[Path] = ()) -> Path:
    """The path of a file to write. Raises InputError where it can't be, and where it is one of those that are `read`,
    or in a folder of these."""
    try:
        target = Path(path)
        place = _place(target)
        taken = target.exists() and (not os.access(target, os.W_OK) or target.is_dir())
        fits = bool(path) and not taken and place.parent.is_dir()
        if fits and (not target.exists() or target.is_file()):
            _scratch(place).touch()
            _scratch(place).unlink()
    except (OSError, ValueError):  # a name that can be none, or a folder that takes no file
        fits = False
    if not fits:
        raise InputError(f"{flag} {path!r}: name a file, in a folder that is there and can be written to")
    if target.is_file() and any(place.is_relative_to(each.resolve()) for each in read):
        raise InputError(f"{flag} {path!r} is read by this command, and would be overwritten: name another file")
    return target


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[TextIO]:
    """A file to write, which takes its place when all is there; until then what was there before stays."""
    if target.exists() and not target.is_file():  # /dev/stdout, a pipe
        with target.open("w", encoding="utf-8") as file:
            yield file
        return
    place = _place(target)
    scratch = _scratch(place)
    try:
        with scratch.open("w", encoding="utf-8") as file:
            yield file
        scratch.replace(place)
    finally:
        scratch.unlink(missing_ok=True)


def _place(target: Path) -> Path:
    """Where a file is in the end: a link to it stays one. Of a pipe or a device the path itself."""
    return target.absolute() if target.exists() and not target.is_file() else target.resolve()


def _scratch(place: Path) -> Path:
    """A file beside it, of a short name, this process's own."""
    return place.with_name(f".{os.getpid()}-{zlib.crc32(os.fsencode(place.name)):08x}")


def new_folder(what: str, path: str) -> Path:
    """The path of a folder to write, new or empty. Raises InputError where it can't be."""
    if not path:
        raise InputError(f"{what} is empty: name a new folder")
    target = Path(path)
    there = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise InputError(f"{what} {target} can't be written: {there} is no folder that can be written to")
    if target.is_dir() and any(target.iterdir()):
        raise InputError(f"{what} {target} is not empty: name a new folder")
    return target


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill beside its place, which it takes when all is there; of a failure nothing is left."""
    scratch = target.absolute().with_name(f".{target.absolute().name}-{os.getpid()}")
    try:
        try:
            scratch.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"{target} can't be written: {error.strerror}; name another folder") from error
        yield scratch
        if target.is_dir():
            target.rmdir()
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
