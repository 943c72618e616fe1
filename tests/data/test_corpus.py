import gzip
import lzma

import numpy as np
import pytest
import tensorflow_datasets as tfds

from lm.config import InputError
from lm.data import cache, holdout
from lm.data.corpus import open_corpus, open_splits


def write(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.txt").write_text(content, encoding="utf-8", newline="")


def test_text_is_one_document_a_file_in_the_order_of_the_ids(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path, b="two\r\nlines", a="one")
    write(tmp_path / "deep", c="three")
    corpus = open_corpus(f"text:{tmp_path}/**/*.txt")
    assert list(corpus) == [("a.txt", "one"), ("b.txt", "two\r\nlines"), ("deep/c.txt", "three")]
    assert corpus[-1].id == "deep/c.txt"
    with pytest.raises(IndexError):
        corpus[3]


def test_ids_and_fingerprint_do_not_depend_on_where_the_text_lies(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        write(tmp_path / place, a="one", b="two")
    here, there = (open_corpus(f"text:{tmp_path}/{place}/*.txt") for place in ("here", "there"))
    assert (here.ids, here.fingerprint) == (there.ids, there.fingerprint)
    write(tmp_path / "there", b="tWo")
    assert open_corpus(f"text:{tmp_path}/there/*.txt").fingerprint != here.fingerprint


def test_fingerprint_tells_apart_where_documents_end(corpus_of):
    assert corpus_of("a", "b").fingerprint != corpus_of("adoc1b").fingerprint


def test_compressed_files_are_read_by_suffix(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("grüß".encode()))
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(b"dich"))
    assert [text for _, text in open_corpus(f"text:{tmp_path}/*")] == ["grüß", "dich"]


def test_document_separator_splits_files(tmp_path):
    write(tmp_path, a="one<|>two<|>", b="<|>three")
    corpus = open_corpus(f"text:{tmp_path}/*.txt", document_separator="<|>")
    assert list(corpus) == [("a.txt#0", "one"), ("a.txt#1", "two"), ("b.txt#0", "three")]


def test_one_document_is_cut_at_nine_tenths_of_its_characters(tmp_path):
    text = "".join(chr(0x4E00 + n) for n in range(97))
    write(tmp_path, book=text)
    train, validation = open_splits(f"text:{tmp_path}/book.txt", None)
    assert train[0].text == text[: int(97 * 0.9)]
    assert train[0].text + validation[0].text == text


def test_documents_are_held_out_by_the_hash_of_their_id(tmp_path):
    write(tmp_path, **{f"file{n:03}": f"text {n}" for n in range(300)})
    train, validation = open_splits(f"text:{tmp_path}/*.txt", None)
    assert sorted([*train.ids, *validation.ids]) == open_corpus(f"text:{tmp_path}/*.txt").ids
    assert 15 <= len(validation) <= 45
    (tmp_path / "file000.txt").unlink()
    write(tmp_path, extra="one more")
    again = open_splits(f"text:{tmp_path}/*.txt", None)[1]
    assert set(again.ids) - {"extra.txt"} == set(validation.ids) - {"file000.txt"}


@pytest.mark.parametrize("count", range(2, 12))
def test_held_out_is_never_empty_and_never_all(count):
    for start in range(50):
        held = holdout.held_out([f"{start}/{n}" for n in range(count)])
        assert 1 <= len(held) < count


def test_the_source_of_a_split_opens_the_same_split(tmp_path):
    write(tmp_path, **{f"file{n}": f"text {n}" for n in range(30)})
    (tmp_path / "file0").write_text("a file that is matched by a pattern with ] at its end")
    for pattern in ("*.txt", "file1.txt", "file[0-9]"):
        for part in open_splits(f"text:{tmp_path}/{pattern}", None):
            again = open_corpus(part.source)
            assert (list(again), again.source) == (list(part), part.source)


def test_an_explicit_validation_source_leaves_training_whole(tmp_path):
    write(tmp_path, a="one", b="two")
    train, validation = open_splits(f"text:{tmp_path}/*.txt", f"text:{tmp_path}/b.txt")
    assert (len(train), len(validation)) == (2, 1)


class ToyNews(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A dataset as a user would have prepared it: two texts, a test split, no validation split."""

    VERSION = tfds.core.Version("1.2.0")
    pkg_dir_path = code_path = tfds.core.Path(__file__).parent

    def _info(self):
        features = {
            "title": tfds.features.Text(),
            "body": tfds.features.Text(),
            "label": tfds.features.Scalar(np.int32),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples("train", 20), "test": self._generate_examples("test", 4)}

    def _generate_examples(self, split, count):
        for n in range(count):
            yield n, {"title": f"{split} {n}", "body": f"body of {split} {n}", "label": n}


@pytest.fixture
def toy_news():
    builder = ToyNews(data_dir=str(cache.directory("tfds")))
    builder.download_and_prepare(file_format="array_record")


def test_tfds_reads_a_prepared_dataset(toy_news):
    corpus = open_corpus("tfds:toy_news@1.2.0#body")
    assert sorted(text for _, text in corpus) == sorted(f"body of train {n}" for n in range(20))
    assert corpus.ids[:2] == ["train#0", "train#1"]
    assert len(open_corpus("tfds:toy_news#title[train[:25%]]")) == 5
    assert len(open_corpus("tfds:toy_news#title[train[:25%]+test[1:]]")) == 8


def test_tfds_validates_on_the_datasets_own_split(toy_news):
    train, validation = open_splits("tfds:toy_news#title", None)
    assert (train.source, validation.source) == ("tfds:toy_news#title[train]", "tfds:toy_news#title[test]")
    assert {text for _, text in validation} == {f"test {n}" for n in range(4)}
    with pytest.raises(InputError, match="both trained and validated"):
        open_splits("tfds:toy_news#title[test]", None)


def test_tfds_errors_name_what_there_is(toy_news):
    with pytest.raises(InputError, match="several texts, .*title"):
        open_corpus("tfds:toy_news")
    with pytest.raises(InputError, match="no text feature 'boddy' .did you mean 'body'"):
        open_corpus("tfds:toy_news#boddy")
    with pytest.raises(InputError, match="no split 'trian' .did you mean 'train'"):
        open_corpus("tfds:toy_news#body[trian]")
    with pytest.raises(InputError, match="did you mean 'tiny_shakespeare'"):
        open_corpus("tfds:tiny_shakespear")
    with pytest.raises(InputError, match="mnist.* has no text: its features are .*image"):
        open_corpus("tfds:mnist")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("text:{}/nothing*.txt", "matches no file"),
        ("text:{}", r"matches a folder: write text:'.*/\*\*/\*.txt'"),
        ("text:{}/empty.txt", "no text: .*empty.txt is empty"),
        ("text:{}/latin1.txt", "latin1.txt is not UTF-8: byte 0xe9 at offset 3"),
        ("text:{}/broken.txt.gz", "broken.txt.gz is damaged"),
        ("text:{}/short.txt.gz", "short.txt.gz is damaged"),
        ("text:{}/later.txt.zst", r"\.zst can't be read"),
        ("text:", "names no file"),
        ("txet:{}/a.txt", "unknown source .*did you mean 'text'"),
        ("{}/a.txt", "or text:.*a.txt for a file"),
        ("builtin:python-stdlb", "did you mean 'python-stdlib'"),
        ("builtin:python-stdlib[tset]", "no split 'tset'.*: it has train, validation"),
    ],
)
def test_bad_sources_are_told_with_a_way_out(tmp_path, source, message):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "broken.txt.gz").write_bytes(b"not gzip at all")
    (tmp_path / "short.txt.gz").write_bytes(gzip.compress(b"x" * 1000)[:-12])
    (tmp_path / "later.txt.zst").write_bytes(b"x")
    with pytest.raises(InputError, match=message):
        list(open_corpus(source.format(tmp_path)))


def test_too_little_text_to_hold_out(tmp_path):
    write(tmp_path, a="x")
    with pytest.raises(InputError, match="one document of 1 characters"):
        open_splits(f"text:{tmp_path}/a.txt", None)
