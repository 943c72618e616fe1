import uuid

import fsspec
import pyarrow as pa
import pytest
from pyarrow import parquet

from lm.config import InputError
from lm.data.corpus import open_corpus


def write(path, columns, **settings):
    parquet.write_table(pa.table(columns), str(path), **settings)


def test_rows_are_documents_across_row_groups_and_files(tmp_path):
    texts = [f"text {n}" for n in range(1000)]
    write(tmp_path / "a.parquet", {"n": list(range(1000)), "text": texts}, row_group_size=300)
    write(tmp_path / "b.parquet", {"text": pa.array(["x", None, "", "x"]).dictionary_encode()})
    corpus = open_corpus(f"parquet:{tmp_path}/*.parquet")
    found = list(corpus.scan())
    assert [document[:2] for document, _ in found[:1000]] == [(f"a.parquet#{n}", text) for n, text in enumerate(texts)]
    assert [document.id for document, _ in found[1000:]] == ["b.parquet#0", "b.parquet#3"]
    assert corpus.skipped == 2
    positions = [position for _, position in found]
    assert positions == sorted(positions)
    assert positions[-1] == corpus.size == sum(path.stat().st_size for path in tmp_path.glob("*.parquet"))


def test_nested_columns_and_pairs(tmp_path):
    write(
        tmp_path / "a.parquet",
        {"t": [{"de": "eins", "en": "one"}, None], "x.y": pa.array(["p", "q"], pa.large_string())},
    )
    assert list(open_corpus(f"pairs:parquet:{tmp_path}/a.parquet#t.en,t.de")) == [("a.parquet#0", "eins", "one\n", ())]
    assert [text for _, text, *_ in open_corpus(f"parquet:{tmp_path}/a.parquet#x.y")] == ["p", "q"]


def test_columns_of_lists(tmp_path):
    sources, targets = [["One.", "Two."], ["Three."], None], [["1 2", None, "one two"], ["3"], []]
    write(tmp_path / "a.parquet", {"s": sources, "t": targets})
    corpus = open_corpus(f"pairs:parquet:{tmp_path}/a.parquet#s,t", pair_separator="")
    assert list(corpus) == [("a.parquet#0", "1 2", "One. Two.", ("one two",)), ("a.parquet#1", "3", "Three.", ())]
    assert corpus.skipped == 1
    lists = pa.ListArray.from_arrays(
        pa.array([0, 1, 2], pa.int32()),
        pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")),
    )
    write(tmp_path / "latin.parquet", {"text": lists})
    with pytest.raises(InputError, match="latin.parquet, row 1: the column 'text' is not UTF-8"):
        list(open_corpus(f"parquet:{tmp_path}/latin.parquet"))


def test_a_pair_with_an_empty_side_is_named(tmp_path):
    write(tmp_path / "a.parquet", {"s": ["one", "two"], "t": ["eins", None]})
    with pytest.raises(InputError, match=r"a.parquet, row 1: the second \(target\) side of the pair is empty"):
        list(open_corpus(f"pairs:parquet:{tmp_path}/a.parquet#s,t"))


def test_remote_files(tmp_path):
    write(tmp_path / "a.parquet", {"text": ["one", "two"]})
    folder = f"memory://{uuid.uuid4().hex}"
    fsspec.filesystem("memory").put(str(tmp_path / "a.parquet"), f"{folder}/a.parquet")
    assert [text for _, text, *_ in open_corpus(f"parquet:{folder}/*.parquet")] == ["one", "two"]
    fsspec.filesystem("memory").rm(folder, recursive=True)


def test_bad_files_are_named(tmp_path):
    write(
        tmp_path / "a.parquet",
        {"txt": ["x"] * 5000, "n": list(range(5000)), "s": [{"a": "x"}] * 5000},
        compression="none",
    )
    with pytest.raises(
        InputError, match="a.parquet has no column 'text' .did you mean 'txt'.*: its columns are txt, n, s, s.a;"
    ):
        list(open_corpus(f"parquet:{tmp_path}/a.parquet"))
    with pytest.raises(InputError, match="the column 'n' holds int64, not strings"):
        list(open_corpus(f"parquet:{tmp_path}/a.parquet#n"))
    whole = (tmp_path / "a.parquet").read_bytes()
    for name, data in (("short", whole[:-10]), ("other", b"no Parquet"), ("hole", bytes(4000) + whole[4000:])):
        (tmp_path / f"{name}.parquet").write_bytes(data)
        with pytest.raises(InputError, match=f"{name}.parquet is damaged or no Parquet file"):
            list(open_corpus(f"parquet:{tmp_path}/{name}.parquet#txt"))
    not_text = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff"))
    write(tmp_path / "latin.parquet", {"text": not_text})
    with pytest.raises(InputError, match="latin.parquet, row 1: the column 'text' is not UTF-8"):
        list(open_corpus(f"parquet:{tmp_path}/latin.parquet"))


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match="a.parquet has 2 columns named 'text'"):
        list(open_corpus(f"parquet:{tmp_path}/a.parquet"))
