"""What commands write where the user says: checked before any work is done, and there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from lm.config import InputError


def writable_file(flag: str, path: str) -> Path:
    """The path of a file to write. Raises InputError where it can't be."""
    wrong = InputError(f"{flag} {path!r}: name a file, in a folder that is there and can be written to")
    try:
        target = Path(path)
        folder = _place(target).parent
        taken = target.exists() and (not os.access(target, os.W_OK) or target.is_dir())
        taken |= not folder.is_dir() or not os.access(folder, os.W_OK)
    except (OSError, ValueError) as error:  # a name that can be none
        raise wrong from error
    if not path or taken:
        raise wrong
    return target


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[TextIO]:
    """A file to write, which takes its place when all is there; until then what was there before stays."""
    if target.exists() and not target.is_file():  # /dev/stdout, a pipe
        with target.open("w", encoding="utf-8") as file:
            yield file
        return
    place = _place(target)
    scratch = place.with_name(f".{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            yield file
        scratch.replace(place)
    finally:
        scratch.unlink(missing_ok=True)


def _place(target: Path) -> Path:
    """Where a file is in the end: a link to it stays one. Of a pipe or a device the path itself."""
    return target.absolute() if target.exists() and not target.is_file() else target.resolve()


def new_folder(what: str, path: str) -> Path:
    """The path of a folder to write, new or empty. Raises InputError where it can't be."""
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
