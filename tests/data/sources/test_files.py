import gzip
import lzma
import os
import pickle
import uuid

import fsspec
import pytest
import zstandard
from fsspec.registry import known_implementations

from lm.config import InputError
from lm.data import cache
from lm.data.sources import files, stream
from lm.data.sources.files import File, matching

OLD = (1_000_000_000, 1_000_000_000)


@pytest.fixture
def memory():
    """A folder of fsspec's file system in memory: its URL."""
    folder = f"memory://{uuid.uuid4().hex}"
    yield folder
    fsspec.filesystem("memory").rm(folder, recursive=True)


def file_of(path):
    return File(path.name, str(path), path.stat().st_size)


def contents(path):
    with stream.opened(file_of(path)) as opened:
        return b"".join(opened.blocks())


def test_ids_are_paths_from_the_fixed_folder_on(tmp_path):
    for name in ("b.txt", "a.txt", "deep/c.txt", "empty.txt"):
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "data" / name).write_text("x" * (name != "empty.txt"))
    found = matching("text:x", f"{tmp_path}/d*/**/*.txt", example="*.txt")
    assert [file.id for file in found] == ["data/a.txt", "data/b.txt", "data/deep/c.txt"]
    assert matching("text:x", f"{tmp_path}/data/a.txt", example="*.txt")[0].id == "a.txt"


def test_remote_files_are_found_and_read(memory):
    with fsspec.open(f"{memory}/deep/a.txt.gz", "wb") as file:
        file.write(gzip.compress(b"one\ntwo"))
    with fsspec.open(f"{memory}/b.txt", "wb") as file:
        file.write(b"three")
    found = matching("text:x", f"{memory}/**/*.txt*", example="*.txt")
    assert [file.id for file in found] == ["b.txt", "deep/a.txt.gz"]
    with stream.opened(pickle.loads(pickle.dumps(found[1]))) as opened:
        assert [line.text for line in opened.lines()] == ["one", "two"]
        assert opened.position == found[1].size
    before = files.digest(found[0])
    with fsspec.open(f"{memory}/b.txt", "wb") as file:
        file.write(b"other")
    assert files.digest(found[0]) != before
    with pytest.raises(InputError, match="matches no file"):
        matching("text:x", f"{memory}/nothing*", example="*.txt")


def test_a_protocol_that_nothing_reads_is_told_with_its_package(monkeypatch):
    monkeypatch.setitem(known_implementations, "abc", {"class": "abcfs.AbcFileSystem", "err": "x"})
    with pytest.raises(InputError, match="pip install abcfs"):
        matching("text:x", "abc://bucket/*.txt", example="*.txt")
    with pytest.raises(InputError, match="ftp://127.0.0.1:9/x can't be opened: .*refused"):
        matching("text:x", "ftp://127.0.0.1:9/x", example="*.txt")
    with pytest.raises(InputError, match="Protocol not known: xyz"):
        matching("text:x", "xyz://bucket/*.txt", example="*.txt")


def test_a_server_that_does_not_answer_is_no_wrong_path():
    pytest.importorskip("aiohttp")
    with pytest.raises(InputError, match="text:x can't be reached: .*127.0.0.1:9"):
        matching("text:x", "http://127.0.0.1:9/x.txt", example="*.txt")


def test_many_members_and_frames_are_one_text(tmp_path):
    parts = [b"one\n" * 50_000, b"two\n", b"", b"three\n" * 100_000]
    (tmp_path / "a.gz").write_bytes(b"".join(map(gzip.compress, parts)))
    (tmp_path / "a.xz").write_bytes(bytes(8).join(map(lzma.compress, parts)) + bytes(4))
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip"
    frames = [zstandard.ZstdCompressor(write_content_size=False).compress(part) for part in parts]
    (tmp_path / "a.zst").write_bytes(skippable + frames[0] + skippable.join(frames[1:]) + skippable)
    for suffix in ("gz", "xz", "zst"):
        assert contents(tmp_path / f"a.{suffix}") == b"".join(parts)


@pytest.mark.parametrize("suffix", ["gz", "xz", "zst"])
def test_damaged_files_are_refused(tmp_path, suffix):
    whole = {"gz": gzip.compress, "xz": lzma.compress, "zst": zstandard.ZstdCompressor().compress}[suffix](
        os.urandom(300_000)
    )
    path = tmp_path / f"a.{suffix}"
    for damaged in (
        whole[:-1],
        whole[:200_000],
        whole[:2],
        b"no such thing at all",
        whole * 2 + whole[:-1],
        whole + b"rubbish",
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=f"a.{suffix} is damaged or not what its suffix says"):
            contents(path)


def test_a_long_line_is_refused_without_reading_it_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "MAX_DOCUMENT_BYTES", 10)
    (tmp_path / "a").write_bytes(b"short\n" + b"x" * 100)
    with stream.opened(file_of(tmp_path / "a")) as opened:
        lines = opened.lines()
        assert next(lines).text == "short"
        with pytest.raises(InputError, match="a, line 2 has more than 10 bytes"):
            next(lines)


def test_lines_end_in_both_ways_and_keep_all_else(tmp_path):
    (tmp_path / "a").write_bytes("\ufeffone\r\ntwo \u2028\x0b\r\r\n\nend".encode())
    with stream.opened(file_of(tmp_path / "a")) as opened:
        assert [line[:2] for line in opened.lines()] == [(1, "one"), (2, "two \u2028\x0b\r"), (3, ""), (4, "end")]


def test_the_hash_of_a_settled_file_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 100_000)
    first = files.digest(file_of(path))
    assert not list(cache.directory("hashes").iterdir())  # just written: it may still change within the clock's tick
    monkeypatch.setattr(files, "SETTLED_SECONDS", -1)
    assert files.digest(file_of(path)) == first
    (kept,) = cache.directory("hashes").iterdir()
    with monkeypatch.context() as unread:
        unread.setattr(files.hashlib, "file_digest", None)  # from here on reading it would fail
        assert files.digest(file_of(path)) == first
    kept.write_text("")  # as a power cut may leave it
    assert files.digest(file_of(path)) == first


def test_a_file_in_anothers_place_has_a_hash_of_its_own(tmp_path, monkeypatch):
    """Of the same size, with the same time put on it, as unpacking an archive does; the system reuses the inode."""
    monkeypatch.setattr(files, "SETTLED_SECONDS", -1)
    path = tmp_path / "a"
    found = []
    for letter in b"xyz":
        path.unlink(missing_ok=True)
        path.write_bytes(bytes([letter]) * 100_000)
        os.utime(path, OLD)
        found.append(files.digest(file_of(path)))
    assert len(set(found)) == 3


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("text")
    with pytest.raises(InputError, match=r"the name of the file b'caf\\xe9.txt' in .* is not UTF-8: rename it"):
        files.matching("text:x", f"{tmp_path}/*", example="*.txt")
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).rename(tmp_path / "café \ufffd.txt")
    assert len(files.matching("text:x", f"{tmp_path}/*", example="*.txt")) == 1


@pytest.mark.parametrize("name", ["i[1].txt", "a*b.txt", "~nobody.txt"])
def test_a_file_is_found_by_its_own_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("text")
    (tmp_path / "i1.txt").write_text("another")
    for pattern in (name, str(tmp_path / name)):
        assert [file.id for file in files.matching("text:x", pattern, example="*.txt")] == [name]
    with pytest.raises(InputError, match="matches no file"):
        files.matching("text:x", "~nosuchuser/x", example="*.txt")
