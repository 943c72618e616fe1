import gzip

import pytest

from lm.config import InputError
from lm.data.corpus import open_corpus, open_splits


def test_columns_of_a_file(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b'one\teins\tmore\tand more\r\n\n "two" \tzw\x65i\n\t\n')
    (tmp_path / "b.tsv.gz").write_bytes(gzip.compress(b"four\tvier"))
    corpus = open_corpus(f"pairs:{tmp_path}/*.tsv*".replace("*.tsv*", "a.tsv"))
    assert list(corpus) == [("a.tsv#1", "eins", "one\n", ()), ("a.tsv#3", "zwei", ' "two" \n', ())]
    assert list(open_corpus(f"pairs:{tmp_path}/*.tsv.gz", pair_separator="|")) == [("b.tsv.gz#1", "vier", "four|", ())]


def test_a_line_without_a_tab_is_named(tmp_path):
    (tmp_path / "a.tsv").write_text("one\teins\ntwo zwei\n")
    with pytest.raises(InputError, match="a.tsv, line 2 has no TAB .*'two zwei'"):
        list(open_corpus(f"pairs:{tmp_path}/a.tsv"))


@pytest.mark.parametrize(("line", "side"), [("three\t", "second .target."), (" \tdrei", "first .source.")])
def test_a_pair_with_an_empty_side_is_named(tmp_path, line, side):
    (tmp_path / "a.tsv").write_text(f"one\teins\n\n{line}\n")
    with pytest.raises(InputError, match=f"a.tsv, line 3: the {side} side of the pair is empty: give it a text"):
        list(open_corpus(f"pairs:{tmp_path}/a.tsv"))
    for name, text in zip(("x.en", "x.de"), line.split("\t"), strict=True):
        (tmp_path / name).write_text(f"one\n\n{text}\n")
    with pytest.raises(InputError, match=f"line 3 of .*x.en and .*x.de: the {side} side of the pair is empty"):
        list(open_corpus(f"pairs:{tmp_path}/x.en,{tmp_path}/x.de"))


def test_lines_of_two_files(tmp_path):
    (tmp_path / "x.en").write_text("one\n\ntwo\n")
    (tmp_path / "x.de.gz").write_bytes(gzip.compress(b"eins\n\nzwei"))
    corpus = open_corpus(f"pairs:{tmp_path}/x.en,{tmp_path}/x.de.gz")
    found = list(corpus.scan())
    assert [document for document, _ in found] == [("x.en#1", "eins", "one\n", ()), ("x.en#3", "zwei", "two\n", ())]
    assert corpus.skipped == 1
    assert found[-1][1] == corpus.size


@pytest.mark.parametrize(("first", "second"), [(3, 5), (5, 3), (1, 2), (2, 1)])
def test_unequal_counts_are_both_named(tmp_path, first, second):
    (tmp_path / "x.en").write_text("line\n" * first)
    (tmp_path / "x.de").write_text("line\n" * second)
    with pytest.raises(InputError, match=f"x.en has {first} lines and .*x.de has {second}"):
        list(open_corpus(f"pairs:{tmp_path}/x.en,{tmp_path}/x.de"))


@pytest.mark.parametrize("count", [40, 1500])
def test_the_same_first_side_is_never_in_both_halves(tmp_path, count):
    (tmp_path / "a.tsv").write_text("".join(f"word {n // 3}\tWort {n}\n" for n in range(count)))
    splits = open_splits(f"pairs:{tmp_path}/a.tsv", None)
    train, validation = (list(part) for part in (splits.train[0].corpus, splits.validation[""]))
    assert len(train) + len(validation) == count
    assert 0 < len(validation) < count / 4
    assert {document.prompt for document in train}.isdisjoint(document.prompt for document in validation)
    other = open_splits(f"pairs:{tmp_path}/a.tsv", None, pair_separator=" | ").validation[""]
    assert [document.id for document in other] == [document.id for document in validation]


def test_too_few_pairs_to_hold_out(tmp_path):
    (tmp_path / "a.tsv").write_text("one\teins\n")
    with pytest.raises(InputError, match="is one pair, too little"):
        open_splits(f"pairs:{tmp_path}/a.tsv", None)
    (tmp_path / "a.tsv").write_text("one\teins\none\tein\n")
    with pytest.raises(InputError, match="the 2 pairs of .* have the same first side"):
        open_splits(f"pairs:{tmp_path}/a.tsv", None)
