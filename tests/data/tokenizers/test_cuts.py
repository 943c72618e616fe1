"""Texts in parts have the ids of the whole; texts that can't be cut for certain aren't."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from lm.data import tokenizer
from lm.data.tokenizers import split_patterns
from lm.data.tokenizers.byte_tokenizer import byte_letters
from tests.data.tokenizers.test_tokenizer_files import random_texts

PATTERNS = {name: getattr(split_patterns, name) for name in ("PIECES", "GPT2", "CL100K", "O200K", "LLAMA3")}


def byte_level_bpe(pattern, vocab_size=600):
    """Its merges are those within the pieces of its own pattern, spaces and line ends included."""
    library = tokenizers.Tokenizer(models.BPE())
    if pattern is None:
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=byte_letters(), show_progress=False)
    library.train_from_iterator(random_texts(0, 500), trainer)
    return library


@pytest.fixture(scope="module", params=[*PATTERNS, "ByteLevel", "bytes", "fallback"])
def one(request):
    if request.param == "bytes":
        return tokenizer.ByteTokenizer()
    if request.param == "fallback":
        return tokenizer.train_bpe(random_texts(0, 500), 600, byte_fallback=True)
    return tokenizer.FileTokenizer(byte_level_bpe(PATTERNS.get(request.param)).to_str())


def test_parts_have_the_ids_of_the_whole(one):
    """Cut at every place that there is: with cuts before any "\\n" or space this fails."""
    cut = 0
    for text in random_texts(3, 1500):
        whole = one.encode(text)
        parts = one.split_at_cuts(text, 1)
        assert "".join(parts) == text
        np.testing.assert_array_equal(np.concatenate([one.encode(part) for part in parts]), whole, err_msg=repr(parts))
        cut += len(parts) - 1
    assert cut > 300


def test_parts_are_of_the_size_asked_for(one):
    text = "one line of text\n" * 1000
    parts = one.split_at_cuts(text, 500)
    assert "".join(parts) == text
    assert len(parts) == pytest.approx(34, abs=2)
    assert {len(part) for part in parts[:-1]} <= set(range(500, 518))
    assert one.split_at_cuts("", 500) == [""]
    assert one.split_at_cuts("short", 500) == ["short"]
    assert one.split_at_cuts("x" * 100, 50) == (["x" * 100] if one.vocab_size != 258 else ["x" * 50] * 2)


def test_a_text_is_not_cut_where_nobody_knows():
    library = byte_level_bpe(None, 300)
    content = json.loads(library.to_str())

    def refused(**changes):
        other = tokenizer.FileTokenizer(json.dumps({**content, **changes}))
        return other.cuts is None and other.split_at_cuts("a b " * 100, 10) == ["a b " * 100]

    assert not refused()
    prefix = {**content["pre_tokenizer"], "add_prefix_space": True}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    split = {"type": "Split", "pattern": {"Regex": r"\S+"}, "behavior": "Isolated", "invert": False}
    library.normalizer = normalizers.NFC()
    assert refused(normalizer=json.loads(library.to_str())["normalizer"])
    assert all(refused(pre_tokenizer=part) for part in (None, prefix, metaspace, split))
    library.normalizer = None
    library.add_tokens(["b a"])
    assert tokenizer.FileTokenizer(library.to_str()).cuts is None
