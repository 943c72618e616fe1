"""Text files -> documents: `text:GLOB`, plain or compressed."""

from __future__ import annotations

import glob
import gzip
import lzma
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from zlib import error as ZlibError

from lm.config import InputError


def documents(pattern: str, separator: str | None) -> tuple[list[str], Callable[[int], str]]:
    """The ids of the documents that a glob matches, ordered, and how to read one.

    An id is the file's path from the glob's fixed folder on; with a separator `#N` counts a file's documents from 0.
    Empty documents are left out.
    """
    files = _matches(pattern)
    if separator is None:
        paths = list(files.values())
        return list(files), lambda index: read(paths[index])
    if not separator:
        raise InputError("data.document_separator is empty: use None for one document a file")

    # Neighbours come from one file, so the last one read is kept.
    @lru_cache(maxsize=1)
    def pieces(path: Path) -> list[str]:
        return [piece for piece in read(path).split(separator) if piece]

    places = [(name, path, n) for name, path in files.items() for n in range(len(pieces(path)))]
    if not places:
        raise InputError(f"text:{pattern} has no text: its {len(files)} files hold nothing but separators")
    return [f"{name}#{n}" for name, _, n in places], lambda index: pieces(places[index][1])[places[index][2]]


def read(path: Path) -> str:
    """A file's text exactly as it stands (no newline translation), decompressed by its suffix."""
    try:
        if path.suffix == ".gz":
            data = gzip.decompress(path.read_bytes())
        elif path.suffix == ".xz":
            data = lzma.decompress(path.read_bytes())
        elif path.suffix == ".zst":
            raise InputError(f"{path}: .zst can't be read: decompress it first, or use .gz or .xz")
        else:
            data = path.read_bytes()
    except (gzip.BadGzipFile, lzma.LZMAError, EOFError, ZlibError) as error:
        raise InputError(f"{path} is damaged or not what its suffix says ({error}): fetch it again") from error
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; "
            f"convert it, for instance with iconv -f latin1 -t utf-8"
        ) from error


def _matches(pattern: str) -> dict[str, Path]:
    """The files with text that a glob matches, by the id of their document, in the order of the ids."""
    if not pattern:
        raise InputError("text: names no file: write text:PATH or text:'GLOB'")
    expanded = Path(pattern).expanduser()
    matched = [Path(name) for name in glob.glob(str(expanded), recursive=True)]  # noqa: PTH207 (Path.glob takes no absolute one)
    files = [path for path in matched if path.is_file()]
    if not files:
        what = "a folder: write" if matched else "no file. Check the path, from"
        hint = f"text:'{pattern.rstrip('/')}/**/*.txt'" if matched else str(Path.cwd())
        raise InputError(f"text:{pattern} matches {what} {hint}")
    with_text = [path for path in files if path.stat().st_size]
    if not with_text:
        raise InputError(
            f"text:{pattern} has no text: " + (f"{files[0]} is empty" if len(files) == 1 else "all files are empty")
        )
    root = _fixed_folder(expanded)
    return dict(sorted((path.relative_to(root).as_posix(), path) for path in with_text))


def _fixed_folder(pattern: Path) -> Path:
    """The deepest folder that a glob names without a wildcard: ids don't depend on where the data lies."""
    root = pattern.parent
    while glob.has_magic(str(root)):
        root = root.parent
    return root
