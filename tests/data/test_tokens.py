import subprocess
import sys

import numpy as np
import pytest

from lm.config import InputError
from lm.data import cache, tokenizer
from lm.data.tokens import tokenize

BYTES = tokenizer.ByteTokenizer()


def test_a_store_holds_every_document_between_bos_and_eos(corpus_of):
    store = tokenize(corpus_of("ab", "", "é c\n d"), BYTES)
    assert store.ids.tolist() == [256, 97, 98, 257, 256, 257, 256, *"é c\n d".encode(), 257]
    assert store.offsets.tolist() == [0, 4, 6, 15]
    assert [store.document(i).tolist() for i in range(3)] == [[97, 98], [], list("é c\n d".encode())]
    assert (store.bytes_D.tolist(), store.words_D.tolist()) == ([2, 0, 7], [1, 0, 3])
    assert (store.document_ids, len(store), store.num_tokens) == (["doc0", "doc1", "doc2"], 3, 15)
    assert (store.bos, store.eos, store.ids.dtype) == (True, True, np.uint16)
    assert store.offsets.dtype == store.bytes_D.dtype == store.words_D.dtype == np.int64


def test_what_the_tokenizer_has_not_is_not_added(corpus_of, monkeypatch):
    one = tokenizer.ByteTokenizer()
    one.bos = None
    one.vocab_size = 2**16 + 1
    store = tokenize(corpus_of("ab", "c"), one)
    assert store.ids.tolist() == [97, 98, 257, 99, 257]
    assert (store.bos, store.eos, store.ids.dtype) == (False, True, np.uint32)
    assert store.document(1).tolist() == [99]


def test_a_store_is_made_once_for_each_text_and_tokenizer(corpus_of, monkeypatch):
    calls = []
    first = tokenize(corpus_of("ab", "c"), BYTES, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(2, 2)]
    again = tokenize(corpus_of("ab", "c", source="elsewhere"), BYTES, progress=lambda *_: pytest.fail("made again"))
    assert (again.fingerprint, again.source) == (first.fingerprint, "elsewhere")
    assert tokenize(corpus_of("ab", "C"), BYTES).fingerprint != first.fingerprint
    assert tokenize(corpus_of("ab", "c"), tokenizer.train_bpe(["abc"], 260)).fingerprint != first.fingerprint
    assert len(list(cache.directory("tokens").iterdir())) == 3


def test_ids_cannot_be_written_to(corpus_of):
    with pytest.raises(ValueError, match="read-only"):
        tokenize(corpus_of("ab"), BYTES).ids[0] = 0


def test_batches_of_text_do_not_show_in_the_store(corpus_of, monkeypatch):
    texts = [f"text {n} " * n for n in range(30)]
    whole = tokenize(corpus_of(*texts), BYTES).ids.tolist()
    monkeypatch.setattr("lm.data.tokens.BATCH_CHARACTERS", 100)
    monkeypatch.setattr("lm.data.tokens.FORMAT_VERSION", -1)
    assert tokenize(corpus_of(*texts), BYTES).ids.tolist() == whole


def test_text_without_text_is_refused_and_nothing_is_kept(corpus_of):
    with pytest.raises(InputError, match="memory has no text: its 2 documents are empty"):
        tokenize(corpus_of("", ""), BYTES)
    assert not list(cache.directory("tokens").iterdir())


def test_two_processes_tokenise_at_once(tmp_path):
    for n in range(50):
        (tmp_path / f"{n:02}.txt").write_text(f"text {n} " * 200)
    program = (
        "from lm.data import corpus, tokenizer, tokens\n"
        f"store = tokens.tokenize(corpus.open_corpus('text:{tmp_path}/*.txt'), tokenizer.ByteTokenizer())\n"
        "print(store.fingerprint, store.num_tokens)"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    (one, error_one), (two, error_two) = [process.communicate() for process in processes]
    assert (error_one, error_two) == (b"", b"")
    assert one == two != b""
    assert len(list(cache.directory("tokens").iterdir())) == 1


def test_a_killed_build_is_made_again(tmp_path, corpus_of):
    program = (
        "import os; from lm.data import corpus, tokenizer, tokens\n"
        "text = corpus.Corpus('memory', ['doc0'], lambda index: 'ab')\n"
        "tokens.tokenize(text, tokenizer.ByteTokenizer(), progress=lambda *_: os.kill(os.getpid(), 9))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert tokenize(corpus_of("ab"), BYTES).document(0).tolist() == [97, 98]


def test_the_builtin_corpus_comes_back_from_its_ids(builtin):
    validation = builtin[1]
    store = tokenize(validation, BYTES)
    for index, (name, text) in enumerate(validation):
        assert store.document_ids[index] == name
        assert BYTES.decode(store.document(index)) == text
        assert store.words_D[index] == len(text.split())
