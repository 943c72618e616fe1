"""Where things that can be made again are kept: built datasets, trained tokenizers and token stores."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lm.config import InputError

LEFTOVER_SECONDS = 7 * 24 * 3600


def directory(*parts: str) -> Path:
    """A folder under `$LM_CACHE`, else under the user's cache folder; made on demand."""
    folder = _root().joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"no folder can be made at {folder}: {error.strerror}; set LM_CACHE to one that can"
        ) from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"{folder} can't be written to: set LM_CACHE to a folder that can")
    return folder


@contextlib.contextmanager
def building(target: Path) -> Iterator[Path]:
    """Gives an empty folder to fill; on a clean exit it becomes `target` in one step.

    `target` is therefore complete or absent, whatever is killed, and when two processes build it at once the first to
    finish wins: both built the same, so the other's copy is dropped.
    """
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    scratch.chmod(target.parent.stat().st_mode)  # mkdtemp's is for its owner only
    try:
        yield scratch
        give_place(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def give_place(scratch: Path, target: Path) -> None:
    """Renames a finished folder to `target`; where another is there by now, that one stays and this one is dropped."""
    try:
        scratch.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Holds the lock of a file, made on demand; waits while another process holds it. It ends with the process.

    Gives False where the system or the file system has no locks: then there is none.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield _lock(handle)
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK):
            return False
        raise
    return True


def clear_leftovers(folder: Path, suffix: str) -> None:
    """Removes what builds that nobody went on with have left in a folder, a week after they last wrote."""
    for path in folder.glob(f".*{suffix}"):
        with contextlib.suppress(OSError):
            newest = max(each.stat().st_mtime for each in (path, *path.iterdir()))
            if time.time() - newest > LEFTOVER_SECONDS:
                shutil.rmtree(path)


def _root() -> Path:
    if chosen := os.environ.get("LM_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "lm"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "lm"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lm"
