"""Files of ready token ids, `tokens:GLOB`: found and described here, read in place by the token store.

nanoGPT's .bin    ids one after another, uint16
llm.c's .bin      256 int32 (magic number, version, number of ids, ...), then the ids, uint16 or uint32
.npy              a one-dimensional array of integers
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from lm.config import InputError
from lm.data.sources import files
from lm.data.sources.files import File

HEADER_BYTES = 1024
LLM_C: dict[tuple[int, int], np.dtype] = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}
"""Ids by magic number and version."""
LLM_C_MAGIC = range(20240000, 20250000)
"""Its other files begin with a date as well."""


class TokenFile(NamedTuple):
    """`size` ids of `dtype` in a file from byte `offset` on."""

    name: str
    path: Path
    dtype: np.dtype
    offset: int
    size: int


@dataclasses.dataclass(frozen=True)
class TokenFiles:
    """Ready ids. `split`: the half by the held-out rule that is meant, "train" or "validation"; None: all."""

    source: str
    files: tuple[TokenFile, ...]
    split: str | None = None

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.offset + file.size * file.dtype.itemsize for file in self.files)

    @functools.cached_property
    def key(self) -> str:
        """SHA-256 over the contents of the files, their names and the split."""
        contents = [
            [file.name, file.dtype.str, files.digest(File(file.name, str(file.path), file.path.stat().st_size))]
            for file in self.files
        ]
        return hashlib.sha256(json.dumps(["TokenFiles", contents, self.split]).encode()).hexdigest()


def find(base: str, pattern: str, split: str | None) -> TokenFiles:
    """The files that a glob matches.

    Raises:
        InputError: no file, or one that isn't in one of the three formats, with what is wrong about it.
    """
    if "://" in pattern:
        raise InputError(f"{base} is remote, but ids are read in place: copy the files here")
    found = tuple(_described(file) for file in files.matching(base, pattern, example="*.bin"))
    return TokenFiles(f"{base}[{split}]" if split else base, found, split)


def _described(file: File) -> TokenFile:
    if file.suffix not in (".bin", ".npy"):
        raise InputError(f"{file.path} is no file of ids by its suffix: tokens: reads .bin (nanoGPT, llm.c) and .npy")
    try:
        with Path(file.path).open("rb") as contents:
            dtype, offset, size = (_array if file.suffix == ".npy" else _binary)(file, contents)
    except OSError as error:
        raise InputError(f"{file.path} can't be read: {error.strerror}") from error
    if not size:
        raise InputError(f"{file.path} has no ids")
    expected = offset + size * dtype.itemsize
    if file.size != expected:
        raise InputError(
            f"{file.path} is damaged: with {size} ids, as its header says, it would have {expected} bytes, not "
            f"{file.size}: fetch it again"
        )
    return TokenFile(file.id, Path(file.path), dtype, offset, size)


def _binary(file: File, contents: BinaryIO) -> tuple[np.dtype, int, int]:
    """The type of the ids, where they begin and how many there are."""
    header = np.frombuffer(contents.read(HEADER_BYTES)[: file.size // 4 * 4], "<i4")
    magic, version, size = (int(number) for number in (*header[:3], -1, -1, -1)[:3])
    if magic in LLM_C_MAGIC:
        dtype: np.dtype | None = LLM_C.get((magic, version))
        if dtype is None or file.size < HEADER_BYTES:
            known = ", ".join(f"{magic} version {version}" for magic, version in LLM_C)
            raise InputError(f"{file.path} has the header {magic} version {version}: known are {known}")
        return dtype, HEADER_BYTES, size
    if file.size % 2:
        raise InputError(f"{file.path} has {file.size} bytes, no whole number of 16-bit ids: is it a file of ids?")
    return np.dtype("<u2"), 0, file.size // 2


def _array(file: File, contents: BinaryIO) -> tuple[np.dtype, int, int]:
    try:
        version = np.lib.format.read_magic(contents)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(contents)
    except ValueError as error:
        raise InputError(f"{file.path} is damaged or no .npy file ({error})") from error
    if dtype.kind not in "iu" or len(shape) != 1:
        raise InputError(
            f"{file.path} holds {dtype} of shape {shape}, not integers in one dimension: save the ids so, for instance "
            "ids.ravel().astype('uint16')"
        )
    return dtype, contents.tell(), shape[0]
