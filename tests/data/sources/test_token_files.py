import numpy as np
import pytest

from lm.config import InputError
from lm.data.corpus import open_corpus, open_splits
from lm.data.sources.token_files import TokenFiles

IDS = np.arange(100) % 90 + 3


def llm_c(ids, *, magic=20240520, version=1, dtype="<u2", size=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if size is None else size
    return header.tobytes() + ids.astype(dtype).tobytes()


def read(file):
    data = file.path.read_bytes()[file.offset :]
    return np.frombuffer(data, file.dtype, file.size).tolist()


def test_the_formats(tmp_path):
    IDS.astype("<u2").tofile(tmp_path / "a.bin")
    (tmp_path / "b.bin").write_bytes(llm_c(IDS))
    (tmp_path / "c.bin").write_bytes(llm_c(IDS, magic=20240801, version=7, dtype="<u4"))
    np.save(tmp_path / "d.npy", IDS.astype("<i8"))
    np.save(tmp_path / "e.npy", IDS.astype(">u4"))
    (tmp_path / "f.bin").write_bytes(b"\3\0")  # a single id, no room for a magic number
    found = open_corpus(f"tokens:{tmp_path}/*")
    assert isinstance(found, TokenFiles)
    assert [file.name for file in found.files] == ["a.bin", "b.bin", "c.bin", "d.npy", "e.npy", "f.bin"]
    assert [read(file) for file in found.files] == [IDS.tolist()] * 5 + [[3]]
    assert (found.split, found.size) == (
        None,
        sum(path.stat().st_size for path in tmp_path.iterdir() if path.is_file()),
    )


def test_splits_and_keys(tmp_path):
    IDS.astype("<u2").tofile(tmp_path / "a.bin")
    splits = open_splits(f"tokens:{tmp_path}/a.bin", None)
    train, validation = splits.train[0].corpus, splits.validation[""]
    assert (train.split, validation.split) == ("train", "validation")
    assert open_corpus(train.source) == train
    keys = {open_corpus(f"tokens:{tmp_path}/a.bin{split}").key for split in ("", "[train]", "[validation]")}
    assert len(keys) == 3
    with pytest.raises(InputError, match="nothing says what to validate on"):
        open_splits(validation.source, None)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.bin", b"xyz", "3 bytes, no whole number of 16-bit ids"),
        ("a.bin", llm_c(IDS, version=2), "header 20240520 version 2: known are 20240520 version 1"),
        ("a.bin", llm_c(IDS, magic=20240522), "header 20240522 version 1"),
        ("a.bin", llm_c(IDS, size=101), "damaged: with 101 ids, .* 1226 bytes, not 1224"),
        ("a.bin", llm_c(IDS[:0]), "has no ids"),
        ("a.bin", b"", "a.bin is empty"),
        ("a.npy", b"\x93NUMPY", "damaged or no .npy file"),
        ("a.npy", IDS.reshape(10, 10), r"holds int64 of shape \(10, 10\), not integers in one dimension"),
        ("a.npy", IDS.astype(float), "holds float64"),
        ("a.npy", np.array([None]), "holds object"),
        ("a.npy", IDS[:0], "has no ids"),
        ("a.pt", b"xx", "no file of ids by its suffix"),
    ],
)  # fmt: skip
def test_bad_files_are_named(tmp_path, name, data, message):
    if isinstance(data, bytes):
        (tmp_path / name).write_bytes(data)
    else:
        np.save(tmp_path / name, data)
    with pytest.raises(InputError, match=message):
        open_corpus(f"tokens:{tmp_path}/{name}")


def test_a_short_array_is_damaged(tmp_path):
    np.save(tmp_path / "a.npy", IDS)
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-1])
    with pytest.raises(InputError, match="damaged: with 100 ids"):
        open_corpus(f"tokens:{tmp_path}/a.npy")
