import pytest

from lm.data import corpus
from tests.data import memory_corpus


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    """Each test has a cache of its own, so that none passes on what another has built."""
    monkeypatch.setenv("LM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def builtin(tmp_path_factory):
    """The built-in corpus, built once: (train, validation)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LM_CACHE", str(tmp_path_factory.mktemp("builtin")))
        splits = corpus.open_splits("builtin:python-stdlib", None)
        return splits.train[0].corpus, splits.validation[""]


@pytest.fixture
def corpus_of():
    """Makes a corpus of texts held in memory."""
    return memory_corpus.corpus_of
