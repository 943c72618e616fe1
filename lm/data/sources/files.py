"""Files by glob, here or remote: their stable ids, their bytes, their hashes."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import json
import os
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

from lm.config import InputError
from lm.data import cache

AnyPath = TypeVar("AnyPath", bound=PurePath)

SMALL = 2**16
"""Bytes of a file that is hashed sooner than its hash is looked up."""
SETTLED_SECONDS = 2.0
"""A file changed less than this ago may be changed again without its time of change telling."""


class File(NamedTuple):
    """A file: its id is the path from the glob's fixed folder on, so that it doesn't depend on where the data lies."""

    id: str
    path: str
    size: int

    @property
    def remote(self) -> bool:
        return "://" in self.path

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.path).suffix


def matching(source: str, pattern: str, *, example: str) -> tuple[File, ...]:
    """The files with contents that a glob matches, in the order of their ids.

    Args:
        source: as the user wrote it, for messages.
        example: what to write at the end of a folder, such as "*.txt".
    """
    before, _, after = source.partition(f":{pattern}")
    if not pattern:
        raise InputError(f"{source} names no file: write {before}:PATH or {before}:'GLOB'")
    folders, found = _remote(source, pattern) if "://" in pattern else _local(pattern)
    if not found:
        if folders:
            raise InputError(f"{source} matches a folder: write {before}:'{pattern.rstrip('/')}/**/{example}'{after}")
        start = "" if "://" in pattern else f", from {Path.cwd()}"
        raise InputError(f"{source} matches no file. Check the path{start}")
    full = [file for file in found if file.size]
    if not full:
        raise InputError(
            f"{source} has no text: " + (f"{found[0].path} is empty" if len(found) == 1 else "all files are empty")
        )
    return tuple(sorted(full))


def opened(file: File) -> BinaryIO:
    """A file's bytes as they lie, unbuffered where it is here."""
    if file.remote:
        filesystem, path = _filesystem(file.path)
        return cast(BinaryIO, filesystem.open(path, "rb"))
    return cast(BinaryIO, io.FileIO(file.path))


def errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """What reading a file may raise: OSError, of a remote one also what its client raises instead; and `others`."""
    clients = {"httpx": "HTTPError", "httpx2": "HTTPError", "aiohttp": "ClientError"}
    clients |= {"botocore.exceptions": "BotoCoreError", "google.auth.exceptions": "GoogleAuthError"}
    loaded = [getattr(sys.modules[module], name) for module, name in clients.items() if module in sys.modules]
    return (OSError, *loaded, *others)


def digest(file: File) -> str:
    """Names a file's contents: the SHA-256 of its bytes, kept from one start to the next; of a remote one its checksum
    there."""
    if file.remote:
        filesystem, path = _filesystem(file.path)
        try:
            return f"remote {filesystem.checksum(path)}"
        except errors() as error:
            raise InputError(f"{file.path} can't be read: {error}") from error
    try:
        state = _state(file)
        if state in _DIGESTS:
            return _DIGESTS[state]
        kept = cache.directory("hashes") / hashlib.sha256(json.dumps(state).encode()).hexdigest()[:32]
        if state.size > SMALL and kept.exists() and re.fullmatch("[0-9a-f]{64}", known := kept.read_text("latin-1")):
            return known
        with Path(file.path).open("rb") as data:
            found = hashlib.file_digest(data, "sha256").hexdigest()
        unchanged = _state(file) == state
    except OSError as error:
        raise InputError(f"{file.path} can't be read: {error.strerror}") from error
    settled = unchanged and time.time() - state.changed_ns / 1e9 > SETTLED_SECONDS
    if settled:
        _DIGESTS[state] = found
    if settled and state.size > SMALL:
        with contextlib.suppress(OSError):  # it saves time, no more
            scratch = kept.with_name(f".{kept.name}-{os.getpid()}")
            scratch.write_text(found, encoding="ascii")
            scratch.replace(kept)
    return found


class _State(NamedTuple):
    """What changes when a file does. `changed_ns` is the inode's own time, which no program sets."""

    path: str
    size: int
    modified_ns: int
    changed_ns: int
    inode: int


_DIGESTS: dict[_State, str] = {}
"""What this process has hashed."""


def _state(file: File) -> _State:
    found = Path(file.path).stat()
    absolute = os.path.abspath(file.path)  # noqa: PTH100 (keeps links)
    return _State(absolute, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def _local(pattern: str) -> tuple[bool, list[File]]:
    """Whether a glob matches folders, and the files that it matches."""
    expanded = Path(os.path.expanduser(pattern))  # noqa: PTH111 (Path's own raises where there is no such user)
    # A file whose name looks like a glob is meant itself.
    names = [str(expanded)] if expanded.is_file() else glob.glob(str(expanded), recursive=True)  # noqa: PTH207
    matched = list(map(Path, names))
    root = _fixed_folder(expanded)
    paths = {path.relative_to(root).as_posix(): path for path in matched if path.is_file()}
    _check_names(paths, root)
    return any(path.is_dir() for path in matched), [
        File(name, str(path), path.stat().st_size) for name, path in paths.items()
    ]


def _check_names(names: Iterable[str], root: PurePath) -> None:
    for name in names:
        if not name.isascii() and name.encode(errors="replace") != name.encode(errors="surrogateescape"):
            raise InputError(f"the name of the file {os.fsencode(name)!r} in {root} is not UTF-8: rename it")


def _remote(source: str, pattern: str) -> tuple[bool, list[File]]:
    filesystem, path = _filesystem(pattern)
    try:
        if glob.has_magic(path) and not pattern.startswith("http"):
            matched = filesystem.glob(path, detail=True)
        else:
            matched = {path: filesystem.info(path)}
    except FileNotFoundError as error:
        # What a server doesn't have and a server that doesn't answer are raised alike.
        cause = error.__cause__
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
            raise InputError(f"{source} can't be reached: {cause}") from error
        matched = {}
    except errors() as error:
        raise InputError(f"{source} can't be listed: {error}") from error
    root = _fixed_folder(PurePosixPath(path))
    _check_names(matched, root)
    return any(info["type"] == "directory" for info in matched.values()), [
        # Some servers don't tell a size.
        File(
            PurePosixPath(name).relative_to(root).as_posix(),
            filesystem.unstrip_protocol(name),
            1 if info["size"] is None else info["size"],
        )
        for name, info in matched.items()
        if info["type"] == "file"
    ]


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec  # of no use to most

    protocol = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or protocol
        raise InputError(f"{url} needs the package {package}: pip install {package}") from error
    except errors(ValueError) as error:
        raise InputError(f"{url} can't be opened: {error}") from error


def _fixed_folder(pattern: AnyPath) -> AnyPath:
    """The deepest folder that a glob names without a wildcard."""
    root = pattern.parent
    while glob.has_magic(str(root)):
        root = root.parent
    return root
