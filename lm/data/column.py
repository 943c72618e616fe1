"""One-dimensional arrays on disk, of any length, read a slice at a time.

By `pread` rather than a memory map: a map's page fault holds Python's lock while the disk works, its touched pages
count as memory of the process, and its read-ahead fetches 32 pages where a row needs one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import weakref
from pathlib import Path

import numpy as np

from lm.config import InputError

BLOCK = 512
"""Entries of a sorted column between two of its index: a page of int64."""
READ_BYTES = 2**30
"""Read at once at most: no system reads more than 2 GiB, and some refuse to."""
OTHER_FILES = 512
"""Files that a process may need to have open besides columns."""


class Column:
    """`column[i]` and `column[start:stop]` of `size` values of `dtype` that lie in a file from byte `offset` on.

    Raises InputError where the file has gone or is shorter than that.
    """

    def __init__(self, path: Path, dtype: np.dtype | type | str, size: int, *, offset: int = 0):
        self.path, self.dtype, self.size, self.offset = path, np.dtype(dtype), size, offset
        try:
            self._file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            way_out = "; raise the limit, ulimit -n" if error.errno == errno.EMFILE else ""
            raise InputError(f"{path} can't be read: {error.strerror}{way_out}") from error
        weakref.finalize(self, os.close, self._file)  # also where the interpreter ends first
        if os.fstat(self._file).st_size < offset + size * self.dtype.itemsize:
            self._damaged()
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int | slice) -> np.ndarray:
        """A copy of the values start..stop, or one value."""
        if isinstance(index, slice):
            start, stop, stride = index.indices(self.size)
            assert stride == 1, "a column is read in runs"
            return self._read(start, max(stop, start))
        index = range(self.size)[index]
        return self._read(index, index + 1)[0]

    def _read(self, start: int, stop: int) -> np.ndarray:
        wanted = (stop - start) * self.dtype.itemsize
        place = self.offset + start * self.dtype.itemsize
        data = os.pread(self._file, min(wanted, READ_BYTES), place)
        while len(data) < wanted:
            more = os.pread(self._file, min(wanted - len(data), READ_BYTES), place + len(data))
            if not more:
                self._damaged()
            data += more
        return np.frombuffer(data, self.dtype)

    def _damaged(self) -> None:
        raise InputError(
            f"{self.path} is damaged: it has {os.fstat(self._file).st_size} bytes, not the "
            f"{self.offset + self.size * self.dtype.itemsize} it was written with; delete {self.path.parent} and start "
            "again, it is then made anew"
        )


class SortedColumn(Column):
    """A column of int64 in ascending order, with every `BLOCK`-th value in memory: a search reads a page or two."""

    def __init__(self, path: Path, size: int):
        super().__init__(path, np.int64, size)
        self._every = Column(_index(path), np.int64, -(-size // BLOCK))[:]

    def before(self, value: int) -> int:
        """How many values are less than `value`: `np.searchsorted(column, value, side="left")`."""
        start, stop = self._block(value)
        return start + int(self[start:stop].searchsorted(value))

    def between(self, low: int, high: int) -> tuple[int, np.ndarray]:
        """The values low <= value <= high, after how many values come before them."""
        start = self._block(low)[0]
        stop = self._block(high + 1)[1]
        found = self[start:stop]
        first, last = found.searchsorted(low), found.searchsorted(high + 1)
        return start + int(first), found[first:last]

    def _block(self, value: int) -> tuple[int, int]:
        """The range of positions among which the first value that is not less than `value` lies."""
        block = int(self._every.searchsorted(value))
        return max(block - 1, 0) * BLOCK, min(block * BLOCK, self.size)


def allow_open_files(columns: int) -> None:
    """Lets this process have so many columns open besides what it has, as far as it may decide that itself."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = columns + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        top = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(top, soft), hard))


def write_index(path: Path, size: int) -> None:
    """Makes the index of a sorted column that is there."""
    column, step = Column(path, np.int64, size), BLOCK * 2**12
    with _index(path).open("wb") as index:
        for start in range(0, size, step):
            column[start : start + step][::BLOCK].tofile(index)


def _index(path: Path) -> Path:
    return path.with_name(f"{path.name}.index")
