import pytest

from lm.data import corpus


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    """Each test has a cache of its own, so that none passes on what another has built."""
    monkeypatch.setenv("LM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def builtin(tmp_path_factory):
    """The built-in corpus, built once: (train, validation)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LM_CACHE", str(tmp_path_factory.mktemp("builtin")))
        return corpus.open_splits("builtin:python-stdlib", None)


@pytest.fixture
def corpus_of():
    """Makes a corpus of texts held in memory."""

    def make(*texts, source="memory"):
        return corpus.Corpus(source, [f"doc{i}" for i in range(len(texts))], lambda index: texts[index])

    return make
