import numpy as np
import pytest

from lm.config import InputError
from lm.data import cache, marks
from lm.data.corpus import open_corpus, open_splits
from lm.data.sources import holdout
from lm.data.tokenizer import ByteTokenizer
from lm.data.tokens import Sizes, tokenize

BOS, EOS = 256, 257


class OnlyEos(ByteTokenizer):
    bos = None


def tokenized(source, tokenizer=None):
    return tokenize(open_corpus(source), tokenizer or OnlyEos())


def documents(store):
    return [bytes(store.document(n).tolist()).decode() for n in range(len(store))]


def nanogpt(path, *documents):
    """EOS after each document."""
    np.array([id for text in documents for id in (*text.encode(), EOS)], "<u2").tofile(path)


@pytest.mark.parametrize("chunk", [3, 2**22])
def test_documents_are_found_and_stay_where_they_are(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(marks, "CHUNK", chunk)
    nanogpt(tmp_path / "a.bin", "first text", "sécond", "x")
    with (tmp_path / "b.bin").open("wb") as file:  # as a shard that ends in the middle of a document
        np.array([*b"fourth", EOS, *b"fi"], "<u2").tofile(file)
    made = tokenized(f"tokens:{tmp_path}/*.bin")
    assert documents(made) == ["first text", "sécond", "x", "fourth", "fi"]
    assert [made.document_id(n) for n in (0, 2, 3)] == ["a.bin#0", "a.bin#2", "b.bin#0"]
    assert made.sizes(1) == Sizes(7, 1)
    assert made.num_tokens == 11 + 8 + 2 + 7 + 2 == made.offsets[-1]
    assert made.read(19, 23).tolist() == [ord("x"), EOS, *b"fo"], "over the edge of a file"
    assert not (made.directory / "ids.bin").stat().st_size


def test_llm_c_puts_eos_before_each_document(tmp_path):
    ids = [EOS, *b"one", EOS, *b"two"]
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids)
    (tmp_path / "a.bin").write_bytes(header.tobytes() + np.array(ids, "<u2").tobytes())
    made = tokenized(f"tokens:{tmp_path}/a.bin")
    assert documents(made) == ["one", "two"]
    assert made.read(0, 8).tolist() == ids


def test_bos_and_eos_around_each_document(tmp_path):
    np.save(tmp_path / "a.npy", np.array([BOS, *b"one", EOS, BOS, *b"two", EOS], np.int64))
    made = tokenized(f"tokens:{tmp_path}/a.npy", ByteTokenizer())
    assert documents(made) == ["one", "two"]
    assert made.offsets[:].tolist() == [0, 5, 10]


def test_ids_that_the_tokenizer_has_not_are_refused(tmp_path):
    np.array([5, 6, 50256, 7], "<u2").tofile(tmp_path / "a.bin")
    with pytest.raises(InputError, match=r"a.bin: id 50256 at position 2, but the tokenizer \(bytes\) has 258 tokens"):
        tokenized(f"tokens:{tmp_path}/a.bin")
    np.save(tmp_path / "a.npy", np.array([5, -1], np.int32))
    with pytest.raises(InputError, match="id -1 at position 1"):
        tokenized(f"tokens:{tmp_path}/a.npy")
    assert not [path for path in cache.directory("tokens").iterdir() if path.suffix != ".lock"]


@pytest.mark.parametrize("few", [1000, 5])
def test_a_tenth_is_held_out_by_the_rule(tmp_path, monkeypatch, few):
    """Of few documents some surely are; of many the hash decides alone."""
    monkeypatch.setattr(holdout, "FEW", few)
    texts = [f"text {n}" for n in range(60)]
    nanogpt(tmp_path / "a.bin", *texts)
    splits = open_splits(f"tokens:{tmp_path}/a.bin", None)
    train, held = (tokenize(part, OnlyEos()) for part in (splits.train[0].corpus, splits.validation[""]))
    names = {f"a.bin#{n}" for n in range(60) if holdout.is_held_out(f"a.bin#{n}")}
    assert {held.document_id(n) for n in range(len(held))} == names != set()
    assert sorted(documents(train) + documents(held)) == sorted(texts)
    assert train.read(0, train.num_tokens).dtype == np.uint16


def test_of_one_document_the_last_tenth_is_held_out(tmp_path):
    np.arange(100, dtype="<u2").tofile(tmp_path / "a.bin")
    splits = open_splits(f"tokens:{tmp_path}/a.bin", None)
    train, held = (tokenize(part, OnlyEos()) for part in (splits.train[0].corpus, splits.validation[""]))
    assert (train.document(0).tolist(), held.document(0).tolist()) == ([*range(90)], [*range(90, 100)])
    assert held.document_id(0) == "a.bin#0[validation]"


def test_more_files_than_may_be_open(tmp_path):
    """The limit is raised as far as this process may."""
    resource = pytest.importorskip("resource")
    for n in range(200):
        np.array([n, EOS], "<u2").tofile(tmp_path / f"{n:03}.bin")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, hard))
    try:
        made = tokenized(f"tokens:{tmp_path}/*.bin")
        assert made.read(0, made.num_tokens)[::2].tolist() == [*range(200)]
    finally:
        del made
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_moved_files_are_found_where_they_are_now(tmp_path):
    nanogpt(tmp_path / "a.bin", "one", "two")
    first = tokenized(f"tokens:{tmp_path}/a.bin")
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.bin").rename(tmp_path / "sub" / "a.bin")
    again = tokenized(f"tokens:{tmp_path}/sub/a.bin")
    assert again.fingerprint == first.fingerprint
    assert documents(again) == ["one", "two"]
