import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from lm.config import InputError
from lm.data import cache, store, tokens
from lm.data.corpus import open_corpus
from lm.data.tokenizer import ByteTokenizer, train_bpe
from lm.data.tokens import Sizes, tokenize

BYTES = ByteTokenizer()


def ids_of(store):
    return store.read(0, store.num_tokens).tolist()


def columns(store):
    """All that a store says of its documents."""
    numbers = range(len(store))
    return [(store.document_id(n), store.document(n).tolist(), store.sizes(n)) for n in numbers], store.corpus_sha256


def stores():
    return sorted(path.name for path in cache.directory("tokens").iterdir())


def test_a_store_holds_every_document_between_bos_and_eos(corpus_of):
    made = tokenize(corpus_of("ab", "é c\n d"), BYTES)
    assert ids_of(made) == [256, 97, 98, 257, 256, *"é c\n d".encode(), 257]
    assert made.offsets[:].tolist() == [0, 4, 13]
    assert [made.document(n).tolist() for n in range(2)] == [[97, 98], list("é c\n d".encode())]
    assert [made.sizes(n) for n in range(2)] == [Sizes(2, 1), Sizes(7, 3)]
    assert ([made.document_id(n) for n in range(2)], len(made), made.num_tokens) == (["doc0", "doc1"], 2, 13)
    assert (made.bos, made.eos, made.read(0, 1).dtype, made.prompts) == (256, 257, np.uint16, None)


def test_what_the_tokenizer_has_not_is_not_added(corpus_of):
    one = ByteTokenizer()
    one.bos = None
    one.vocab_size = 2**16 + 1
    made = tokenize(corpus_of("ab", "c"), one)
    assert ids_of(made) == [97, 98, 257, 99, 257]
    assert (made.bos, made.eos, made.read(0, 1).dtype) == (None, 257, np.uint32)
    assert made.document(1).tolist() == [99]


def test_a_store_is_made_once_for_each_text_and_tokenizer(corpus_of):
    calls = []
    first = tokenize(corpus_of("ab", "c"), BYTES, progress=lambda done, total: calls.append((done, total)))
    assert calls and calls[-1][0] == calls[-1][1] and calls == sorted(calls)
    again = tokenize(corpus_of("ab", "c", source="elsewhere"), BYTES, progress=lambda *_: pytest.fail("made again"))
    assert (again.fingerprint, again.source) == (first.fingerprint, "elsewhere")
    assert tokenize(corpus_of("ab", "C"), BYTES).fingerprint != first.fingerprint
    assert tokenize(corpus_of("ab", "c"), train_bpe(["abc"], 260)).fingerprint != first.fingerprint
    assert len(stores()) == 3


def test_neither_batches_nor_processes_show(corpus_of, monkeypatch):
    """Documents are cut into parts to be encoded; words that run over a cut are one."""
    texts = [f"text {n} wörds " * n for n in range(1, 30)] + ["x" * 1000, " \n " * 200]
    whole = columns(tokenize(corpus_of(*texts), BYTES))
    assert [sizes.words for _, _, sizes in whole[0]] == [len(text.split()) for text in texts]
    for number, (batch, small, processes) in enumerate([(50, 2**24, 1), (100, 0, 2), (2**20, 0, 3)]):
        monkeypatch.setattr(store, "BATCH_CHARACTERS", batch)
        monkeypatch.setattr(store, "SMALL_BYTES", small)
        monkeypatch.setattr(store, "FORMAT_VERSION", -number)
        assert columns(tokenize(corpus_of(*texts), BYTES, processes=processes)) == whole
    assert len(stores()) == 4


def test_the_prompt_of_a_pair_is_known(tmp_path):
    (tmp_path / "a.tsv").write_text("a cat\tun chat\nno\tnon\n")
    made = tokenize(open_corpus(f"pairs:{tmp_path}/a.tsv", pair_separator=" = "), BYTES)
    assert BYTES.decode(made.document(0)) == "a cat = un chat"
    assert made.prompts[:].tolist() == [1 + len("a cat = "), 1 + len("no = ")]
    assert [made.sizes(n) for n in range(2)] == [Sizes(7, 2, 8, 3), Sizes(3, 1, 5, 2)]
    joined = tokenize(open_corpus(f"pairs:{tmp_path}/a.tsv", pair_separator="-"), BYTES)
    assert joined.sizes(0) == Sizes(7, 2, 6, 1), "a cat-un chat has three words"


def test_text_without_text_is_refused_and_nothing_is_kept(corpus_of):
    with pytest.raises(InputError, match="all its 2 documents are empty"):
        tokenize(corpus_of("", ""), BYTES)
    assert [name[-5:] for name in stores()] == [".lock"]


def test_empty_documents_are_counted(corpus_of):
    made = tokenize(corpus_of("a", "", "b"), BYTES)
    assert (len(made), made.skipped) == (2, 1)


def test_bad_text_leaves_other_stores_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n')
    good = columns(tokenize(open_corpus(f"jsonl:{path}"), BYTES))
    path.write_text('{"text": "good"}\n{"text": "\\ud800"}\n')
    with pytest.raises(InputError, match="a.jsonl, line 2"):
        tokenize(open_corpus(f"jsonl:{path}"), BYTES)
    path.write_text('{"text": "good"}\n')
    assert columns(tokenize(open_corpus(f"jsonl:{path}"), BYTES)) == good
    assert [name.rpartition(".")[2] for name in stores() if name.startswith(".")] == ["lock"]


BUILD = """
    import os, resource, sys
    from lm.config import InputError
    from lm.data import corpus, store, tokens
    from lm.data.tokenizer import ByteTokenizer
    store.JOURNAL_CHARACTERS, store.BATCH_CHARACTERS = 2000, 500
    source, what = sys.argv[1:]
    done = 0
    def progress(*_):
        global done
        done += 1
        if what == "kill" and done == 37:
            os.kill(os.getpid(), 9)
    if what == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))
    try:
        made = tokens.tokenize(corpus.open_corpus(source), ByteTokenizer(), progress=progress)
        print(made.fingerprint, made.num_tokens)
    except InputError as error:
        print(error)
"""


def build(source, what=""):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(BUILD), source, what],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture
def many(tmp_path):
    """A source of fifty documents of 900 to 1000 bytes."""
    for n in range(50):
        (tmp_path / f"{n:02}.txt").write_text(f"text {n:02} " * (100 + n // 5))
    return f"text:{tmp_path}/*.txt"


class Counting(ByteTokenizer):
    """Remembers how many texts it has encoded."""

    encoded = 0

    def encode(self, text):
        Counting.encoded += 1
        return super().encode(text)


@pytest.mark.parametrize("what", ["kill", "full"])
def test_a_build_that_was_cut_short_is_gone_on_with(many, monkeypatch, what):
    """By a kill, and by a disk that is full (a limit on the size of files stands for it)."""
    process = build(many, what)
    said, errors = process.communicate()
    assert (process.returncode, errors) == ((-9, "") if what == "kill" else (0, ""))
    if what == "full":
        assert "can't be written" in said and "the same command goes on from where it was" in said
    assert [name.rpartition(".")[2] for name in stores()] == ["building", "lock"]
    monkeypatch.setattr(Counting, "encoded", 0)
    resumed = columns(tokenize(open_corpus(many), Counting()))
    assert 0 < Counting.encoded < 50
    assert len(stores()) == 1
    monkeypatch.setattr(store, "FORMAT_VERSION", -1)
    assert columns(tokenize(open_corpus(many), BYTES)) == resumed


def test_a_fault_on_the_way_loses_nothing(many, monkeypatch):
    """A process that dies, a network that fails: the text is the same afterwards, and the build goes on."""
    monkeypatch.setattr(store, "JOURNAL_CHARACTERS", 2000)
    monkeypatch.setattr(store, "BATCH_CHARACTERS", 2000)

    class Failing(Counting):
        def encode(self, text):
            if Counting.encoded == 30:
                raise InputError("a process has died")
            return super().encode(text)

    monkeypatch.setattr(Counting, "encoded", 0)
    with pytest.raises(InputError, match="a process has died"):
        tokenize(open_corpus(many), Failing())
    monkeypatch.setattr(Counting, "encoded", 0)
    assert len(tokenize(open_corpus(many), Counting())) == 50
    assert 0 < Counting.encoded < 50


def test_without_locks_each_builds_in_a_folder_of_its_own(many, monkeypatch):
    first = columns(tokenize(open_corpus(many), BYTES))
    monkeypatch.setattr(store, "FORMAT_VERSION", -1)
    monkeypatch.setattr(cache, "_lock", lambda handle: False)
    begun = []

    def progress(*_):
        if not begun:  # another process comes in the middle of this one's work
            begun.append(columns(tokenize(open_corpus(many), BYTES)))

    assert columns(tokenize(open_corpus(many), BYTES, progress=progress)) == begun[0] == first
    assert len(stores()) == 2


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path):
    for n in range(3):
        (tmp_path / f"{n}.txt").write_text(f"text {n}")
    corpus = open_corpus(f"text:{tmp_path}/*.txt")
    with pytest.raises(InputError, match="was changed while it was read: start again"):
        tokenize(corpus, BYTES, progress=lambda *_: (tmp_path / "2.txt").write_text("another"))
    assert not [name for name in stores() if not name.endswith(".lock")]


def test_old_leftovers_are_cleared(many):
    build(many, "kill").communicate()
    (left,) = cache.directory("tokens").glob(".*.building")
    tokenize(open_corpus(many.replace("*", "0*")), BYTES)
    assert left.exists(), "it may still be gone on with"
    for path in (*left.iterdir(), left):
        os.utime(path, (1e9, 1e9))
    tokenize(open_corpus(many.replace("*", "1*")), BYTES)
    assert not left.exists()


def test_what_a_kill_left_behind_is_made_anew_where_it_can_not_be_used(many):
    build(many, "kill").communicate()
    (folder,) = cache.directory("tokens").glob(".*.building")
    (folder / "ids.bin").write_bytes(b"short")
    assert len(tokenize(open_corpus(many), BYTES)) == 50


def test_two_processes_tokenise_at_once(many):
    answers = [process.communicate() for process in [build(many) for _ in range(2)]]
    assert [errors for _, errors in answers] == ["", ""]
    assert answers[0] == answers[1] != ("", "")
    assert len(stores()) == 1


@pytest.mark.parametrize("name", ["ids.bin", "offsets.bin", "names.bin", "store.json"])
def test_a_store_that_was_damaged_is_said(corpus_of, name):
    made = tokenize(corpus_of("some text", "more"), BYTES)
    path = made.directory / name
    path.write_bytes(path.read_bytes()[:-1])
    said = "a file of it .* can't be read" if name == "store.json" else rf"{name} has \d+ bytes, not the \d+ it was"
    with pytest.raises(InputError, match=f"the token store {made.directory} is damaged: {said}.* delete the folder"):
        tokenize(corpus_of("some text", "more"), BYTES)


@pytest.mark.parametrize("content", ["[]", "{}", '{"files": {}}'])
def test_a_description_of_something_else_is_said(corpus_of, content):
    made = tokenize(corpus_of("some text"), BYTES)
    (made.directory / "store.json").write_text(content)
    with pytest.raises(InputError, match="is damaged"):
        tokenize(corpus_of("some text"), BYTES)


def test_wrong_offsets_are_said(corpus_of):
    made = tokenize(corpus_of("some text", "more"), BYTES)
    np.array([0, 10**9, 2 * 10**9], np.int64).tofile(made.directory / "offsets.bin")
    with pytest.raises(InputError, match="is damaged: ids 0 to 1000000000 of 17"):
        tokenize(corpus_of("some text", "more"), BYTES).document(0)


def test_a_store_that_is_cut_off_while_it_is_read_is_said(corpus_of):
    made = tokenize(corpus_of("some text", "more"), BYTES)
    (made.directory / "ids.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"ids.bin is damaged: it has 0 bytes"):
        made.read(0, 5)


def test_the_builtin_corpus_comes_back_from_its_ids(builtin):
    validation = builtin[1]
    made = tokenize(validation, BYTES)
    for index, document in enumerate(validation):
        assert made.document_id(index) == document.id
        assert BYTES.decode(made.document(index)) == document.text
        assert made.sizes(index).words == len(document.text.split())


def test_reads_run_over_shards(corpus_of):
    made = tokenize(corpus_of("some text"), BYTES)
    whole = ids_of(made)
    parts = [tokens.Column(made.directory / "ids.bin", np.uint16, size, offset=2 * at) for at, size in ((0, 4), (4, 7))]
    sharded = tokens.TokenStore(made.directory, source="", tokenizer=BYTES, shards=parts)
    for start in range(len(whole) + 1):
        for stop in range(start, len(whole) + 1):
            assert sharded.read(start, stop).tolist() == whole[start:stop]
