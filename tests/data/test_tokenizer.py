import json
import os
import pickle
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from lm.config import InputError, TokenizerConfig
from lm.data import cache, tokenizer
from lm.data.sources.token_files import TokenFiles
from lm.data.tokenizers import file_tokenizer

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


@pytest.fixture(scope="module")
def fallback():
    return tokenizer.train_bpe(["def encode(self, text):\n    return self.table[text]\n" * 20], 400, byte_fallback=True)


@pytest.fixture(params=["bytes", "bpe", "fallback", "file"])
def each(request, trained, fallback, metaspace):
    made = {"bytes": tokenizer.ByteTokenizer(), "bpe": trained, "fallback": fallback, "file": metaspace}
    assert made[request.param].lossless == (request.param != "file")
    return made[request.param]


@pytest.mark.parametrize("text", TEXTS)
def test_decode_gives_the_text_back(each, text):
    ids = each.encode(text)
    assert ids.dtype == np.int32
    assert each.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_per_token_add_up_to_the_utf8_length(each, text):
    ids = each.encode(text)
    sizes = each.bytes_per_token(text)
    assert (sizes.shape, sizes.dtype) == (ids.shape, np.int32)
    assert sizes.sum() == len(text.encode())


def test_bytes_per_token_counts_each_piece_of_a_split_character(each):
    ids = each.encode("\U0001f9ff")  # not in the training text: in pieces that aren't UTF-8 alone
    assert len(ids) > 1
    assert each.bytes_per_token("\U0001f9ff")[-3:].min() > 0
    assert each.decode(ids[:2]) in ("\ufffd", "\ufffd\ufffd")


def test_special_tokens_are_never_made_of_text(each):
    text = each.decode(each.encode("<|bos|><s></s><|eos|>"))
    ids = each.encode("<|bos|><s></s><|eos|>")
    assert text == "<|bos|><s></s><|eos|>"
    assert not {each.bos, each.eos} & set(ids.tolist())
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
    letters = json.loads(one.content)["model"]["vocab"]
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


class Texts:
    """What training needs of a corpus."""

    def __init__(self, *texts, key="k"):
        self.texts, self.key, self.source = texts, key, "memory"
        self.size = sum(len(text) for text in texts)

    def scan(self):
        done = 0
        for text in self.texts:
            done += len(text)
            yield Document("id", text), done


class Document(NamedTuple):
    id: str
    text: str
    prompt: str = ""


def test_build_trains_once_for_each_text_and_recipe(monkeypatch):
    text, more = Texts("one two three " * 50, "four five six " * 50), Texts("seven " * 50, key="m")
    config = TokenizerConfig("bpe", None, 270)
    seen = []
    first = tokenizer.build(config, text, progress=lambda done, total: seen.append((done, total)))
    assert (first.kind, first.vocab_size) == ("bpe", 270)
    assert seen == [(700, 1400), (1400, 1400)]
    others = [
        tokenizer.build(config, (text, more)),
        tokenizer.build(TokenizerConfig("bpe", None, 290, byte_fallback=True), text),
        tokenizer.build(TokenizerConfig("bpe", None, 270, special_tokens=("<pad>",)), text),
    ]
    assert len({one.sha256 for one in (first, *others)}) == 4
    assert len(list(cache.directory("tokenizers").iterdir())) == 4
    monkeypatch.setattr(tokenizer, "train_tokenizer", lambda *_, **__: pytest.fail("trained again"))
    assert tokenizer.build(config, [text]).sha256 == first.sha256


def test_progress_counts_both_passes_over_all_corpora():
    seen = []
    corpora = [Texts("ab cd", "ef"), Texts("gh")]
    tokenizer.train_tokenizer(corpora, 300, byte_fallback=True, progress=lambda *at: seen.append(at))
    assert seen == [(5, 18), (7, 18), (9, 18), (14, 18), (16, 18), (18, 18)]


def test_prompts_are_trained_on_too():
    class Pairs(Texts):
        def scan(self):
            yield Document("id", "b" * 40, prompt="a" * 40), 80

    assert tokenizer.build(TokenizerConfig("bpe", None, 262), Pairs()).encode("a" * 4).size < 4


def test_build_by_kind(tmp_path, metaspace):
    text = Texts("some text")
    assert tokenizer.build(TokenizerConfig(), text).kind == "bytes"
    path = metaspace.save(tmp_path)
    loaded = tokenizer.build(TokenizerConfig("file", str(path)), text)
    assert (loaded.kind, loaded.bos, loaded.eos, loaded.vocab_size) == ("file", 1, 2, metaspace.vocab_size)


def test_ready_ids_have_no_text_to_train_on():
    with pytest.raises(InputError, match="tokens:x.bin is ready ids.*tokenizer.kind to file"):
        tokenizer.build(TokenizerConfig("bpe", None, 280), TokenFiles("tokens:x.bin", ()))


def test_a_file_without_bos_has_none_and_starts_with_eos(trained):
    content = json.loads(trained.content)
    content["added_tokens"] = [{**content["added_tokens"][0], "content": "<|endoftext|>"}]
    one = tokenizer.FileTokenizer(json.dumps(content))
    assert (one.bos, one.eos, one.first_id) == (None, 398, 398)


def test_a_pickled_tokenizer_still_takes_special_names_for_text(each):
    again = pickle.loads(pickle.dumps(each))
    assert (again.sha256, again.kind, again.bos) == (each.sha256, each.kind, each.bos)
    for text in TEXTS:
        np.testing.assert_array_equal(again.encode(text), each.encode(text))


def test_many_long_texts_in_one_batch(trained, monkeypatch):
    monkeypatch.setattr(file_tokenizer, "_PART", 50)
    monkeypatch.setattr(file_tokenizer, "_BLOCK", 3)
    texts = [f"line {number}\n" * number for number in range(40)]
    for ids, text in zip(trained.encode_batch(texts), texts, strict=True):
        assert ids.tolist() == trained._library.encode(text).ids
    assert trained.encode_batch([]) == []


def test_dropout_in_a_file_makes_no_random_ids(trained):
    content = json.loads(trained.content)
    content["model"]["dropout"] = 0.5
    one = tokenizer.FileTokenizer(json.dumps(content))
    assert one.encode("return the table " * 20).tolist() == trained.encode("return the table " * 20).tolist()


def unigram():
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((letter, -2.0) for letter in "ab</s>")]
    return models.Unigram(pieces, unk_id=0)


def whole_words():
    return models.BPE(
        {letter: number for number, letter in enumerate(["<s>", "</s>", *"ab</s>"])}, [], ignore_merges=True
    )


@pytest.mark.parametrize("model", [unigram, whole_words])
def test_a_model_that_takes_whole_pieces_makes_no_special_ids_of_text(model):
    """`encode_special_tokens` alone leaves the model to find them in its own vocabulary."""
    library = tokenizers.Tokenizer(model())
    library.add_special_tokens(["<s>", "</s>"])
    library.encode_special_tokens = True
    one = tokenizer.FileTokenizer(library.to_str())
    assert one.eos in library.encode("</s>").ids
    assert one.eos not in one.encode("</s>")
    assert one.decode(one.encode("ab</s>")).replace(" ", "") == "ab</s>"
    assert one.decode([*one.encode("ab"), one.eos]).replace(" ", "") == "ab"


@pytest.mark.parametrize("content", ["", "{}", '{"model": {"type": "Nothing"}}', "\x00", "some words"])
def test_a_file_that_is_no_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match="tokenizer.json is not a tokenizer"):
        tokenizer.load(tmp_path)
    with pytest.raises(InputError, match="no tokenizer at .*nowhere"):
        tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no tokenizer in .*: give the path of a tokenizer.json, a SentencePiece"):
        tokenizer.load(tmp_path.parent)


def test_a_damaged_tokenizer_in_the_cache_is_trained_anew():
    text = Texts("some text " * 50)
    first = tokenizer.build(TokenizerConfig("bpe", None, 270), text)
    (kept,) = cache.directory("tokenizers").glob("*/tokenizer.json")
    kept.write_bytes(kept.read_bytes()[:100])
    assert tokenizer.build(TokenizerConfig("bpe", None, 270), text).content == first.content == kept.read_bytes()


def test_a_tokenizer_that_can_not_be_written_is_said(tmp_path):
    with pytest.raises(InputError, match="the tokenizer can't be written to .*missing/tokenizer.json: No such file"):
        tokenizer.ByteTokenizer().save(tmp_path / "missing" / "tokenizer.json")
