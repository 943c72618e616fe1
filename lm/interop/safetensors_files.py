"""Safetensors files, one tensor at a time: checked before anything is read, written without a copy of the whole.

A file is 8 bytes with the length of a header, the header (JSON: {name: {dtype, shape, data_offsets}}), and the tensors'
bytes, little-endian, one after another without gaps (huggingface/safetensors, format description).
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lm.config import InputError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""What a folder's only file is called, and the list of several."""
FLOATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
"""The dtypes that weights are read and written in, by numpy's name, as the format calls them."""
_DTYPES = {code: jnp.dtype(name) for name, code in FLOATS.items()}
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2}
_BYTES |= {"U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "C64": 8}
_LONGEST_HEADER = 100_000_000
"""In bytes; the format's own limit."""


class Tensor(NamedTuple):
    """Where a tensor lies: `start` is the place of its first byte in its file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    bytes: int

    def read(self, name: str) -> np.ndarray:
        """The array in its own dtype. Raises InputError for one that is no floating-point array."""
        if self.dtype not in _DTYPES:
            raise InputError(f"{self.path}: {name} is of dtype {self.dtype}: weights must be {', '.join(FLOATS)}")
        array = np.empty(self.shape, _DTYPES[self.dtype])
        with self.path.open("rb") as file:
            file.seek(self.start)
            read = file.readinto(array.reshape(-1).view(np.uint8).data) if self.bytes else 0
        if read != self.bytes:
            raise InputError(f"{self.path} ends inside {name}: it has changed while it was read")
        return array


def open_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model folder by name: of model.safetensors, else of the shards that its index lists, else of all
    *.safetensors that are there. Raises InputError where a file is missing, broken or holds a name of another."""
    if (folder / WHOLE).is_file():
        return open_file(folder / WHOLE)
    if (folder / INDEX).is_file():
        listed = _read_index(folder / INDEX)
        paths = [folder / name for name in sorted(set(listed.values()))]
        for path in paths:
            if not path.is_file():
                held = sum(folder / name == path for name in listed.values())
                raise InputError(f"{path} is missing: {INDEX} says that it holds {held} tensors. Fetch it again")
    else:
        listed, paths = {}, sorted(folder.glob("*.safetensors"))
    found: dict[str, Tensor] = {}
    for path in paths:
        for name, tensor in open_file(path).items():
            if name in found:
                raise InputError(f"{name} is in both {found[name].path} and {path}: remove the file that is too much")
            found[name] = tensor
    for name, file in listed.items():
        if name not in found or found[name].path != folder / file:
            raise InputError(f"{folder / file} has no tensor {name}, which {INDEX} says it holds. Fetch it again")
    return found


def open_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file by name, after checking all that its header says against the file's size."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            begin = file.read(8)
            if begin == b"version ":
                raise InputError(f"{path} is a Git LFS pointer, not the weights: fetch them with git lfs pull")
            if len(begin) < 8:
                raise InputError(f"{path} is no whole safetensors file: {size} bytes. Fetch it again")
            (length,) = struct.unpack("<Q", begin)
            if length > min(size - 8, _LONGEST_HEADER):
                raise InputError(
                    f"{path} is no whole safetensors file: {size} bytes, its header alone has {length}. Fetch it again"
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from error
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a safetensors file: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise InputError(f"{path} is not a safetensors file: its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _described(path, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].bytes)):
        if tensor.start != end:
            how = "overlaps the one before it" if tensor.start < end else "leaves a gap before it"
            raise InputError(f"{path}: {name} {how}: the header's data_offsets are wrong")
        end += tensor.bytes
    if end != size:
        what = "it is cut off" if end > size else "something is behind its last tensor"
        raise InputError(f"{path} has {size} bytes where its header promises {end}: {what}. Fetch it again")
    return tensors


def write_folder(
    folder: Path,
    tensors: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    *,
    dtype: str,
    max_shard_bytes: int,
) -> list[Path]:
    """Writes tensors, by name and shape, into model.safetensors, or shards of at most `max_shard_bytes` and an index.

    `read(name)` is called once each, in order; a tensor larger than a shard gets one of its own. Returns the files.
    """
    itemsize = _BYTES[FLOATS[dtype]]
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in tensors.items():
        size = math.prod(shape) * itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    count = len(shards)
    files = [WHOLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for file, names in zip(files, shards, strict=True):
        write_file(folder / file, {name: tensors[name] for name in names}, read, dtype=dtype)
    if count > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(math.prod(shape) for shape in tensors.values()) * itemsize
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        files.append(INDEX)
    return [folder / file for file in files]


def write_file(
    path: Path, tensors: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray], *, dtype: str
) -> None:
    """Writes one file under a temporary name, which becomes its own when all is there."""
    code = FLOATS[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        end = offset + math.prod(shape) * _BYTES[code]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)  # so that every reader finds the tensors aligned
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        for name, shape in tensors.items():
            given = read(name)
            with np.errstate(over="ignore"):
                array = np.asarray(given, _DTYPES[code], order="C")
            assert array.shape == tuple(shape), (name, array.shape, shape)
            if dtype == "float16" and not np.isfinite(array).all():
                largest = float(np.abs(given).max())
                raise InputError(f"{name} reaches {largest:.3g}, more than float16 holds: use bfloat16 or float32")
            file.write(array.reshape(-1).view(np.uint8).data)
            del array  # before the next one is made
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, compared a piece at a time."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.path.open("rb") as a, other.path.open("rb") as b:
        a.seek(one.start)
        b.seek(other.start)
        pieces: Iterable[int] = range(0, one.bytes, 1 << 24)
        return all(a.read(size) == b.read(size) for size in (min(1 << 24, one.bytes - at) for at in pieces))


def _read_index(path: Path) -> dict[str, str]:
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        entries = [(str(name), Path(file)) for name, file in listed.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is no index of shards ({type(error).__name__}: {error}). Fetch it again") from error
    for name, file in entries:
        if file.name != str(file) or len(file.name) > 255:
            raise InputError(f"{path}: {name} is said to be in {file}: shards lie beside their index")
    return {name: str(file) for name, file in entries}


def _described(path: Path, name: str, entry: Any, data: int) -> Tensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sound = _are_sizes([*shape, begin, end]) and begin <= end
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise InputError(f"{path}: the header's entry of {name} is broken: {entry!r}")
    if not isinstance(dtype, str) or dtype not in _BYTES:
        raise InputError(f"{path}: {name} is of dtype {dtype!r}: weights must be {', '.join(FLOATS)}")
    if end - begin != math.prod(shape) * _BYTES[dtype]:
        raise InputError(
            f"{path}: {name} has {end - begin} bytes by its data_offsets, "
            f"{math.prod(shape) * _BYTES[dtype]} by its shape {shape} and dtype {dtype}: the header is wrong"
        )
    return Tensor(path, dtype, tuple(shape), data + begin, end - begin)


def _are_sizes(values: Sequence[Any]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)
