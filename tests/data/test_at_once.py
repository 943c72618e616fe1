"""Several processes that want the same tokenizer and the same tokens at once: one makes each, and all read it whole."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import textwrap
import time

import numpy as np

from lm.data import cache
from lm.data.corpus import open_corpus
from lm.data.tokenizer import ByteTokenizer
from lm.data.tokens import tokenize

PROCESSES = 4
READ = """
    import json, pathlib, sys, time
    from lm.config import TokenizerConfig
    from lm.data import store, tokenizer
    from lm.data.corpus import open_corpus
    from lm.data.tokens import tokenize
    source, folder, number = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3]
    made = []
    def noted(module, name):
        original = getattr(module, name)
        def call(*arguments, **named):
            made.append(name)
            time.sleep(0.3)  # as long as the others need to come
            return original(*arguments, **named)
        setattr(module, name, call)
    noted(tokenizer, "train_tokenizer")
    noted(store, "write")
    (folder / f"ready{number}").touch()
    while not (folder / "go").exists():
        time.sleep(0.001)
    corpus = open_corpus(source)
    bpe = tokenizer.build(TokenizerConfig(kind="bpe", vocab_size=300), corpus)
    tokens = tokenize(corpus, bpe)
    whole = [tokens.document(n).tolist() for n in range(len(tokens))]
    print(json.dumps([made, bpe.sha256, tokens.fingerprint, tokens.corpus_sha256, whole]))
"""


def write_texts(folder):
    for n in range(20):
        (folder / f"{n:02}.txt").write_text(f"text {n} of the many texts " * (n + 1))
    return f"text:{folder}/*.txt"


def test_one_makes_it_and_all_read_it_whole(tmp_path):
    source = write_texts(tmp_path)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(READ), source, str(tmp_path), str(number)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(PROCESSES)
    ]
    while len(list(tmp_path.glob("ready*"))) < PROCESSES:  # on an empty cache, all at the same moment
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    (tmp_path / "go").touch()
    answers = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    assert [made for made, *_ in answers if made] != [], "none made it"
    assert sorted(name for made, *_ in answers for name in made) == ["train_tokenizer", "write"]
    assert all(found == answers[0][1:] for _, *found in answers)
    assert len(answers[0][-1]) == 20


def test_machines_without_a_common_lock_make_it_side_by_side(tmp_path, monkeypatch):
    """Lustre mounted with localflock: each machine has the lock to itself, in one folder."""
    source = write_texts(tmp_path)
    monkeypatch.setattr(cache, "_lock", lambda handle: True)
    others = []

    def progress(*_):
        if not others:  # another machine comes in the middle of this one's work
            monkeypatch.setattr(platform, "node", lambda: "another")
            others.append(tokenize(open_corpus(source), ByteTokenizer()))

    mine = tokenize(open_corpus(source), ByteTokenizer(), progress=progress)
    assert mine.fingerprint == others[0].fingerprint and mine.corpus_sha256 == others[0].corpus_sha256
    for store in (mine, others[0]):
        np.testing.assert_array_equal(store.read(0, store.num_tokens), others[0].read(0, mine.num_tokens))
    assert [path.name for path in cache.directory("tokens").iterdir() if not path.name.endswith(".lock")] == [
        mine.directory.name
    ]
