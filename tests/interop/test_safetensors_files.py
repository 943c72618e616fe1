"""The reader believes nothing that a header says, and what the writer makes the field's own library reads."""

from __future__ import annotations

import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lm.config import InputError
from lm.interop.safetensors_files import INDEX, WHOLE, open_file, open_folder, same_bytes, write_folder

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "empty": np.zeros((0, 4), np.float32),
    "b": np.linspace(-2, 2, 5).astype(np.float32),
    "scalar": np.array(3, np.float32),
}


def write(path, header, data=b"\0" * 24):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + data)
    return path


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_the_library_writes(tmp_path):
    save_file(ARRAYS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = open_file(tmp_path / "x.safetensors")
    assert set(found) == set(ARRAYS)
    for name, array in ARRAYS.items():
        read = found[name].read(name)
        assert read.dtype == array.dtype and np.array_equal(read, array)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shard", [1, 20, 10_000])
def test_the_library_reads_what_we_write(dtype, shard, tmp_path):
    asked = []

    def read(name):
        asked.append(name)
        return ARRAYS[name]

    shapes = {name: array.shape for name, array in ARRAYS.items()}
    files = write_folder(tmp_path, shapes, read, dtype=dtype, max_shard_bytes=shard)
    assert asked == list(ARRAYS)
    assert (len(files) == 1) == (shard == 10_000)
    assert not list(tmp_path.glob("*.tmp"))
    found = {}
    for file in files:
        found |= load_file(file) if file.suffix == ".safetensors" else {}
    ours = open_folder(tmp_path)
    for name, array in ARRAYS.items():
        assert np.array_equal(found[name], array.astype(jnp.dtype(dtype)))
        assert np.array_equal(ours[name].read(name), found[name])
    if shard != 10_000:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"]["total_size"] == 12 * jnp.dtype(dtype).itemsize


BROKEN = {
    "no header": (b"", b"", "header"),
    "not json": (b"{]", b"", "JSON"),
    "deep json": (b"[" * 100_000, b"", "JSON"),
    "a list": ([], b"", "object"),
    "unknown dtype": ({"a": entry([2], 0, 8, "F7")}, b"\0" * 8, "F7"),
    "negative size": ({"a": entry([-2], 0, 8)}, b"\0" * 8, "a is broken"),
    "fractional size": ({"a": entry([2.0], 0, 8)}, b"\0" * 8, "a is broken"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8, "a is broken"),
    "backwards": ({"a": entry([2], 8, 0)}, b"\0" * 8, "a is broken"),
    "another size": ({"a": entry([3], 0, 8)}, b"\0" * 8, "12 by its shape"),
    "overlap": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"\0" * 12, "b overlaps"),
    "gap": ({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, b"\0" * 20, "b leaves a gap"),
    "cut off": ({"a": entry([2], 0, 8)}, b"\0" * 7, "cut off"),
    "too long": ({"a": entry([2], 0, 8)}, b"\0" * 9, "behind its last"),
    "huge": ({"a": entry([2**62], 0, 2**64)}, b"\0" * 9, "cut off"),
}


@pytest.mark.parametrize(("header", "data", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_refused(header, data, message, tmp_path):
    path = tmp_path / "x.safetensors"
    if header == b"":
        path.write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    else:
        write(path, header, data)
    with pytest.raises(InputError, match=message) as raised:
        open_file(path)
    assert str(path) in str(raised.value)


def test_other_dtypes_are_refused_when_read(tmp_path):
    save_file({"mask": np.ones((2, 2), bool)}, tmp_path / "x.safetensors")
    found = open_file(tmp_path / "x.safetensors")  # a mask that nobody reads is no error
    with pytest.raises(InputError, match="mask is of dtype BOOL"):
        found["mask"].read("mask")


def test_broken_shards_are_refused(tmp_path):
    shapes = {name: array.shape for name, array in ARRAYS.items()}
    files = write_folder(tmp_path, shapes, ARRAYS.__getitem__, dtype="float32", max_shard_bytes=1)
    index = tmp_path / INDEX
    good = json.loads(index.read_text())

    def listing(**places):
        index.write_text(json.dumps({**good, "weight_map": {**good["weight_map"], **places}}))

    listing(more=files[0].name)
    with pytest.raises(InputError, match="has no tensor more"):
        open_folder(tmp_path)
    listing(a="../x.safetensors")
    with pytest.raises(InputError, match="beside their index"):
        open_folder(tmp_path)
    index.write_text("{}")
    with pytest.raises(InputError, match="no index of shards"):
        open_folder(tmp_path)
    listing()
    save_file({"b": ARRAYS["b"], "a": ARRAYS["a"]}, files[-2])
    with pytest.raises(InputError, match="is in both"):
        open_folder(tmp_path)
    files[0].unlink()
    with pytest.raises(InputError, match=f"{files[0].name} is missing"):
        open_folder(tmp_path)
    save_file(ARRAYS, tmp_path / WHOLE)  # as transformers looks for it: first
    assert set(open_folder(tmp_path)) == set(ARRAYS)


def test_same_bytes(tmp_path):
    save_file({"a": ARRAYS["a"], "b": ARRAYS["a"], "c": ARRAYS["a"] + 1, "d": ARRAYS["a"].T.copy()}, tmp_path / "x")
    found = open_file(tmp_path / "x")
    assert [same_bytes(found["a"], found[name]) for name in "abcd"] == [True, True, False, False]
