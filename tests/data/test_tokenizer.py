import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from lm.config import InputError, TokenizerConfig
from lm.data import cache, tokenizer

TEXTS = (
    "",
    "plain text",
    "  leading and trailing  ",
    "def f(x):\n\treturn {'a': x_1 ** 2}  # done\r\n\n\n    pass",
    "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 and 🇨🇭",
    "中文字符，日本語のテキスト、한국어",
    "e\u0301 is not \u00e9, nor \u212b \u00c5",  # a normalizer would change these
    "\x00\x01\x7f\ufeff\u2028\u200b\U0010ffff",
    "<|bos|> <|eos|><|endoftext|></s>",
    "word" * 500 + " " * 300 + "!" * 300 + "\n" * 300,
)


@pytest.fixture(scope="module")
def trained():
    code = "def encode(self, text):\n    return self.table[text]\n\n\nclass Table(dict):\n    pass\n" * 20
    return tokenizer.train_bpe([code, *TEXTS], 400)


@pytest.fixture
def metaspace():
    """A file as Llama's: a space is put in front, spaces are U+2581, and what has no token of its own is bytes."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    for token in ("\u2581", "a", "b", "\u00e9", "ab", "\u2581a"):
        vocab[token] = len(vocab)
    merges = [("a", "b"), ("\u2581", "a")]
    model = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    model.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    model.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer.FileTokenizer(model.to_str())


@pytest.fixture(params=["bytes", "bpe", "file"])
def each(request, trained, metaspace):
    return {"bytes": tokenizer.ByteTokenizer(), "bpe": trained, "file": metaspace}[request.param]


@pytest.mark.parametrize("text", TEXTS)
def test_decode_gives_the_text_back(each, text):
    ids = each.encode(text)
    assert ids.dtype == np.int32
    assert each.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_per_token_add_up_to_the_utf8_length(each, text):
    ids = each.encode(text)
    sizes = each.bytes_per_token(ids)
    assert sizes.shape == ids.shape
    assert sizes.sum() == len(text.encode())


def test_bytes_per_token_counts_each_piece_of_a_split_character(trained):
    for one in (tokenizer.ByteTokenizer(), trained):
        ids = one.encode("\U0001f9ff")  # not in the training text: in pieces that aren't UTF-8 alone
        assert len(ids) > 1
        assert one.bytes_per_token(ids).min() > 0
        assert one.bytes_per_token(ids).sum() == 4
        assert one.decode(ids[:1]) == "\ufffd"


def test_special_tokens_are_never_made_of_text_and_count_no_bytes(each):
    text = each.decode(each.encode("<|bos|><s></s><|eos|>"))
    ids = each.encode("<|bos|><s></s><|eos|>")
    assert text == "<|bos|><s></s><|eos|>"
    assert not {each.bos, each.eos} & set(ids.tolist())
    assert each.bytes_per_token([each.bos, each.eos]).tolist() == [0, 0]
    assert each.decode([each.bos, *each.encode("ab"), each.eos]) == "ab"


def test_encode_batch_is_encode_of_each(each):
    for ids, text in zip(each.encode_batch(TEXTS), TEXTS, strict=True):
        np.testing.assert_array_equal(ids, each.encode(text))


def test_a_saved_tokenizer_opens_here_and_in_the_library_with_the_same_ids(each, tmp_path):
    saved = each.save(tmp_path)
    assert saved == tmp_path / "tokenizer.json"
    again = tokenizer.load(tmp_path)
    assert (again.sha256, again.vocab_size, again.bos, again.eos) == (each.sha256, each.vocab_size, each.bos, each.eos)
    library = tokenizers.Tokenizer.from_file(str(saved))
    assert library.get_vocab_size() == each.vocab_size
    for text in TEXTS[:-2]:  # without the special tokens' names, which the library takes for them
        np.testing.assert_array_equal(again.encode(text), each.encode(text))
        assert library.encode(text, add_special_tokens=False).ids == each.encode(text).tolist()
    assert list(tmp_path.glob("*.json")) == [saved]
    assert each.save(tmp_path / "other.json") == tmp_path / "other.json"


def test_bytes_are_their_values(tmp_path):
    one = tokenizer.ByteTokenizer()
    assert one.encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert (one.vocab_size, one.bos, one.eos) == (258, 256, 257)
    assert isinstance(tokenizer.load(one.save(tmp_path)), tokenizer.ByteTokenizer)
    letters = json.loads(one.file_content)["model"]["vocab"]
    assert sorted(letters) == sorted(pre_tokenizers.ByteLevel.alphabet())


def test_bytes_that_are_not_utf8_decode_to_the_replacement_character(trained):
    everything = np.arange(256)
    plain = tokenizer.ByteTokenizer()
    assert plain.decode(everything) == bytes(range(256)).decode("utf-8", "replace")
    assert plain.decode([0xFF, 97, 300]) == "\ufffda"
    assert "\ufffd" in trained.decode(everything)


def test_trained_bpe_has_its_specials_last_and_the_size_asked_for(trained):
    assert (trained.vocab_size, trained.bos, trained.eos, trained.first_id) == (400, 398, 399, 398)


def test_bpe_training_does_not_depend_on_threads_or_on_the_run(tmp_path):
    """Ties between pairs are where a hash map's order would show."""
    program = (
        "import sys, random; from lm.data import tokenizer\n"
        "draw = random.Random(0)\n"
        "texts = [' '.join(draw.choice('abcdefgh') * draw.randint(1, 3) + draw.choice('xyz') for _ in range(300))"
        " for _ in range(40)]\n"
        "print(tokenizer.train_bpe(texts, 500).sha256)"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": parallel},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads, parallel in (("1", "false"), ("1", "true"), ("4", "true"))
    }
    assert len(found) == 1


def test_build_trains_once_for_each_text_and_size(corpus_of, monkeypatch):
    text = corpus_of("one two three " * 50, "four five six " * 50)
    config = TokenizerConfig("bpe", None, 280)
    first = tokenizer.build(config, text)
    assert first.kind == "bpe"
    assert len(list(cache.directory("tokenizers").iterdir())) == 1
    monkeypatch.setattr(tokenizer, "train_bpe", lambda *_: pytest.fail("trained again"))
    assert tokenizer.build(config, text).sha256 == first.sha256


def test_build_by_kind(corpus_of, tmp_path, metaspace):
    text = corpus_of("some text")
    assert tokenizer.build(TokenizerConfig(), text).kind == "bytes"
    path = metaspace.save(tmp_path)
    loaded = tokenizer.build(TokenizerConfig("file", str(path)), text)
    assert (loaded.kind, loaded.bos, loaded.eos, loaded.vocab_size) == ("file", 1, 2, metaspace.vocab_size)


def test_a_file_without_bos_has_none_and_starts_with_eos(trained):
    content = json.loads(trained.file_content)
    content["added_tokens"] = [{**content["added_tokens"][0], "content": "<|endoftext|>"}]
    one = tokenizer.FileTokenizer(json.dumps(content))
    assert (one.bos, one.eos, one.first_id) == (None, 398, 398)


@pytest.mark.parametrize("content", ["", "{}", '{"model": {"type": "Nothing"}}', "\x00"])
def test_a_file_that_is_no_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match="tokenizer.json is not a tokenizer.json"):
        tokenizer.load(tmp_path)
    with pytest.raises(InputError, match="no tokenizer at .*nowhere"):
        tokenizer.load(tmp_path / "nowhere")
