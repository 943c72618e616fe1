"""The surprisal of every token, with the text that each one stands for."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest

from lm.data import tokenizer as tokenizers
from lm.data.corpus import open_corpus
from lm.data.sources.document import Document
from lm.data.tokenizer import ByteTokenizer
from lm.data.tokens import tokenize
from lm.evaluation.surprisal import SurprisalWriter, cut
from tests.data.memory_corpus import corpus_of

TEXTS = [Document("a", "the cat 👩‍🚀 sat"), Document("b", "猫坐在垫子上", "a prompt: "), Document("c", "x")]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_pieces_are_the_text(kind):
    corpus = corpus_of(*TEXTS)
    tokenizer = ByteTokenizer() if kind == "bytes" else tokenizers.train_bpe(["the cat sat on the mat"] * 9, 264)
    store, file = tokenize(corpus, tokenizer), io.StringIO()
    write = SurprisalWriter(file, corpus, store, tokenizer)
    for number in (0, 1, 2):
        ids = np.append(store.document(number), [tokenizer.eos]).astype(np.int32)
        nats = np.full(len(ids), 0.5, np.float32)
        nats[0] = np.nan
        write(number, ids, nats)
    records = [json.loads(line) for line in file.getvalue().splitlines()]
    for number, (record, document) in enumerate(zip(records, TEXTS, strict=True)):
        assert record["id"] == document.id
        assert record["tokens"] == [*store.document(number).tolist(), tokenizer.eos]
        assert "".join(record["pieces"]) == document.prompt + document.text and record["pieces"][-1] == ""
        assert sum(record["bytes"]) == len((document.prompt + document.text).encode())
        assert record["nats"] == [None, *[0.5] * (len(record["tokens"]) - 1)]


def test_a_character_stands_with_its_last_byte():
    assert cut("aé😀b", np.array([1, 1, 1, 3, 0, 1, 1])) == ["a", "", "é", "", "", "😀", "b"]
    assert cut("é猫", np.array([5])) == ["é猫"]


def test_ready_ids_have_no_text(tmp_path):
    np.save(tmp_path / "ids.npy", np.array([104, 105, 257, 33, 257], np.uint16))
    files, tokenizer, file = open_corpus(f"tokens:{tmp_path}/ids.npy"), ByteTokenizer(), io.StringIO()
    store = tokenize(files, tokenizer)
    SurprisalWriter(file, files, store, tokenizer)(0, store.document(0).astype(np.int32), np.ones(2, np.float32))
    record = json.loads(file.getvalue())
    assert record["tokens"] == [104, 105] and record["pieces"] == ["h", "i"] and record["bytes"] is None
