import pickle
import shutil
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds

from lm.config import InputError
from lm.data.corpus import open_corpus, open_splits
from lm.data.sources import dataset
from tests.data.reading import halves, ids, texts


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


class ToyTranslation(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Pairs, inside another feature, and no split but train."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = code_path = tfds.core.Path(__file__).parent

    def _info(self):
        features = {"pair": tfds.features.Translation(["de", "en"]), "source": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for n in range(300):
            yield n, {"pair": {"de": f"Satz {n}", "en": f"sentence {n // 2}"}, "source": "toy"}


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """A folder with both datasets, prepared."""
    folder = tmp_path_factory.mktemp("toys")
    for builder in (ToyNews, ToyTranslation):
        builder(data_dir=str(folder)).download_and_prepare(file_format="array_record")
    return folder


@pytest.fixture
def toy(toys, monkeypatch):
    monkeypatch.setattr(dataset, "_tfds_folder", lambda: toys)


def test_tfds_reads_a_prepared_dataset(toy):
    corpus = open_corpus("tfds:toy_news@1.2.0#body")
    assert sorted(texts(corpus)) == sorted(f"body of train {n}" for n in range(20))
    assert ids(corpus)[:2] == ["train#0", "train#1"]
    found = list(corpus.scan())
    assert found[-1][1] == corpus.size > 0
    assert len(list(open_corpus("tfds:toy_news#title[train[:25%]]"))) == 5
    assert len(list(open_corpus("tfds:toy_news#title[train[:25%]+test[1:]]"))) == 8
    assert list(pickle.loads(pickle.dumps(corpus))) == list(corpus)


def test_tfds_keys_follow_split_and_feature(toy):
    sources = ("#body", "#title", "#title[test]", "#title[train[:25%]]")
    assert len({open_corpus(f"tfds:toy_news{source}").key for source in sources}) == 4
    assert open_corpus("tfds:toy_news#body").key == open_corpus("tfds:toy_news@1.2.0#body[train]").key


def test_tfds_validates_on_the_datasets_own_split(toy):
    train, validation = halves("tfds:toy_news#title")
    assert (train.source, validation.source) == ("tfds:toy_news#title[train]", "tfds:toy_news#title[test]")
    assert set(texts(validation)) == {f"test {n}" for n in range(4)}
    with pytest.raises(InputError, match="both trained and validated"):
        open_splits("tfds:toy_news#title[test]", None)


def test_tfds_pairs(toy):
    train, validation = halves("pairs:tfds:toy_translation#pair.en,pair.de", pair_separator="|")
    pairs = {(document.prompt, document.text) for part in (train, validation) for document in part}
    assert pairs == {(f"sentence {n // 2}|", f"Satz {n}") for n in range(300)}
    assert {document.prompt for document in train}.isdisjoint(document.prompt for document in validation)
    with pytest.raises(InputError, match="no text feature 'pair.fr' .*: it has "):
        open_corpus("pairs:tfds:toy_translation#pair.en,pair.fr")


def test_tfds_needs_a_dataset_in_array_records(toys, toy, tmp_path, monkeypatch):
    shutil.copytree(toys, tmp_path / "copy")
    described = tmp_path / "copy/toy_news/1.2.0/dataset_info.json"
    described.write_text(described.read_text().replace("array_record", "tfrecord"))
    monkeypatch.setattr(dataset, "_tfds_folder", lambda: tmp_path / "copy")
    with pytest.raises(InputError, match="is stored as tfrecord, which needs TensorFlow: prepare it again with"):
        open_corpus("tfds:toy_news#body")


def test_tfds_errors_name_what_there_is(toy):
    with pytest.raises(InputError, match="several texts, .*title"):
        open_corpus("tfds:toy_news")
    with pytest.raises(InputError, match="no text feature 'boddy' .did you mean 'body'"):
        open_corpus("tfds:toy_news#boddy")
    with pytest.raises(InputError, match="no split 'trian' .did you mean 'train'"):
        open_corpus("tfds:toy_news#body[trian]")
    with pytest.raises(InputError, match="did you mean 'tiny_shakespeare'"):
        open_corpus("tfds:tiny_shakespear")
    with pytest.raises(InputError, match="did you mean 'wmt14_translate'"):
        open_corpus("pairs:tfds:wmt14_translat/fr-en#fr,en")
    with pytest.raises(InputError, match="no text feature 'es' .*: it has .*fr"):
        open_corpus("pairs:tfds:wmt14_translate/fr-en#es,en")
    with pytest.raises(InputError, match="mnist.* has no text: its features are .*image"):
        open_corpus("tfds:mnist")


def test_tfds_gives_up_soon_and_quietly_without_a_network(monkeypatch, caplog):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(InputError, match="TFDS can't prepare tiny_shakespeare"):
        open_corpus("tfds:tiny_shakespeare")
    assert time.monotonic() - start < 20
    assert not caplog.records
