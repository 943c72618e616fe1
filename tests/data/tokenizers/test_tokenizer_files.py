"""Every format of file that load() opens; ids compared with the library that the format comes from."""

import base64
import json
import random

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from lm.config import InputError
from lm.data import tokenizer
from lm.data.tokenizers import split_patterns, tiktoken_ranks
from lm.data.tokenizers.byte_tokenizer import byte_letters
from lm.data.tokenizers.special_ids import SpecialIds

# The patterns as tiktoken itself writes them (tiktoken_ext/openai_public.py of tiktoken 0.14).
TIKTOKEN_GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
TIKTOKEN_CL100K = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
    r"""|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)
ALPHABET = [
    *"aeistkK'sSdDmMtTlLvVrReE0123.,!/_-()  \n\n\r\t",
    *("'re", "'LL", "   ", "\n\n", "\r\n", " \n", "/\n", " the", "hello", "World", "<|endoftext|>"),
    *("👩‍👩‍👧‍👦", "🇨🇭", "中", "文", "，", "日本", "한", "é", "e\u0301", "ſ", "\u00a0", "\u2028", "\u3000", "\x1c"),
    *("\x85", "²", "½", "Ⅷ", "\u0b95\u0bbf", "\x00", "\ufeff", "\u200d", "\U0010ffff"),
]


def random_texts(seed, number):
    draw = random.Random(seed)
    return ["".join(draw.choice(ALPHABET) for _ in range(draw.randint(0, 60))) for _ in range(number)]


@pytest.fixture(scope="module")
def trained():
    """A byte-level BPE of a few hundred merges within GPT-2's pieces, and its ranks."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = byte_letters()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=700, initial_alphabet=letters, show_progress=False)
    library.train_from_iterator(random_texts(0, 400) + ["hello  World the\n\n they're"] * 50, trainer)
    library.decoder = tokenizers.decoders.ByteLevel()
    return library


@pytest.fixture(scope="module")
def ranks(trained):
    byte = {letter: number for number, letter in enumerate(byte_letters())}
    return {bytes(byte[letter] for letter in token): number for token, number in trained.get_vocab().items()}


def write_ranks(path, ranks):
    lines = [
        base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    ]
    path.write_bytes(b"".join(lines))
    return path


@pytest.fixture
def known(ranks, monkeypatch):
    """Our few ranks pass for an encoding of that size."""
    encoding = tiktoken_ranks.Encoding("small", split_patterns.CL100K, {"<|endoftext|>": len(ranks) + 2})
    monkeypatch.setitem(tiktoken_ranks.KNOWN, len(ranks), encoding)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (split_patterns.GPT2, TIKTOKEN_GPT2),
        (split_patterns.CL100K, TIKTOKEN_CL100K),
        (split_patterns.O200K, split_patterns.O200K),
        (split_patterns.LLAMA3, split_patterns.LLAMA3),
    ],
    ids=["gpt2", "cl100k", "o200k", "llama3"],
)
def test_ranks_give_the_ids_that_tiktoken_gives(ours, theirs, ranks, tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    special = {"<|endoftext|>": len(ranks) + 1}
    content = tiktoken_ranks.convert(ranks, tiktoken_ranks.Encoding("x", ours, special), tmp_path)
    one = tokenizer.FileTokenizer(content)
    reference = tiktoken.Encoding("x", pat_str=theirs, mergeable_ranks=ranks, special_tokens=special)
    assert (one.vocab_size, one.eos, one.lossless) == (reference.n_vocab, len(ranks) + 1, True)
    for text in random_texts(1, 500):
        assert one.encode(text).tolist() == reference.encode_ordinary(text), text
        assert one.decode(one.encode(text)) == text


def test_a_rank_file_opens_by_its_first_line_and_is_kept_as_a_tokenizer_json(ranks, known, tmp_path):
    """Llama 3's is called tokenizer.model."""
    one = tokenizer.load(write_ranks(tmp_path / "tokenizer.model", ranks))
    assert (one.bos, one.eos, one.vocab_size) == (None, len(ranks) + 2, len(ranks) + 3)
    assert tokenizer.load(write_ranks(tmp_path / "x", ranks)).sha256 == one.sha256
    assert tokenizer.load(tmp_path).sha256 == one.sha256
    saved = one.save(tmp_path)
    assert saved.name == "tokenizer.json"
    again = tokenizer.load(tmp_path)  # which now finds the tokenizer.json first
    assert (again.sha256, again.eos) == (one.sha256, one.eos)
    library = tokenizers.Tokenizer.from_file(str(saved))
    assert library.encode("hello they're").ids == one.encode("hello they're").tolist()


def test_a_whole_piece_is_taken_though_merging_would_not_make_it(ranks, known, tmp_path):
    added = {**ranks}
    last = max(added, key=added.get)
    del added[last]
    added[b"qxzjq"] = len(added)
    one = tokenizer.load(write_ranks(tmp_path / "x.tiktoken", added))
    assert one.encode("qxzjq").tolist() == [len(ranks) - 1]
    assert one.encode("qxzjqq").size > 2


def test_facts_of_the_known_encodings():
    assert {size: len(encoding.special) for size, encoding in tiktoken_ranks.KNOWN.items()} == {
        50256: 1, 50280: 1, 100256: 5, 199998: 2, 128000: 256,
    }  # fmt: skip
    llama = tiktoken_ranks.KNOWN[128000].special
    assert sorted(llama.values()) == list(range(128000, 128256))
    assert (llama["<|end_header_id|>"], llama["<|eot_id|>"]) == (128007, 128009)
    assert llama["<|reserved_special_token_250|>"] == 128255


def test_rank_files_that_can_t_be_opened(ranks, known, tmp_path):
    path = tmp_path / "x.tiktoken"
    whole = write_ranks(path, ranks).read_bytes().splitlines(keepends=True)

    def refuses(lines, message):
        path.write_bytes(b"".join(lines))
        with pytest.raises(InputError, match=message):
            tokenizer.load(path)

    refuses(whole[:-1], rf"x.tiktoken has {len(ranks) - 1} ranks, .*known are 50256 \(GPT-2.*tokenizer.json")
    refuses([*whole[:9], b"@@@ 9\n", *whole[10:]], "x.tiktoken:10: not `base64 rank`")
    refuses([*whole[:9], b"abcde 9\n", *whole[10:]], "x.tiktoken:10: Invalid base64")
    refuses([*whole[:-1], whole[-1].split()[0] + b" 9999\n"], f"has no rank {len(ranks) - 1}")
    refuses([*whole[:-1], whole[-1].split()[0] + b" 3\n"], "gives a rank to two tokens")
    refuses([*whole[:3], b"cXF4anE= 3\n", *whole[4:]], "no token for byte 3")


def test_gpt2_s_pair_of_files(trained, tmp_path):
    trained.model.save(str(tmp_path))
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps({**vocabulary, "<|endoftext|>": len(vocabulary)}))
    one = tokenizer.load(tmp_path)
    assert (one.bos, one.eos, one.vocab_size) == (None, len(vocabulary), len(vocabulary) + 1)
    assert one.lossless
    for text in random_texts(2, 200):
        assert one.encode(text).tolist() == trained.encode(text).ids
        assert one.decode(one.encode(text)) == text
    assert {tokenizer.load(tmp_path / name).sha256 for name in ("vocab.json", "merges.txt")} == {one.sha256}
    assert tokenizer.load(one.save(tmp_path / "tokenizer.json")).sha256 == one.sha256


def test_pairs_of_files_that_can_t_be_opened(trained, tmp_path):
    trained.model.save(str(tmp_path))
    vocabulary, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    whole = json.loads(vocabulary.read_text())
    lines = merges.read_text().split("\n")

    def refuses(message, tokens=whole, pairs=lines):
        vocabulary.write_text(json.dumps(tokens))
        merges.write_text("\n".join(pairs))
        with pytest.raises(InputError, match=message):
            tokenizer.load(tmp_path)

    refuses(
        "not a byte-level vocabulary.*it has no 'a'",
        {token: n for token, n in whole.items() if token != "a"} | {"x3": whole["a"]},
    )
    refuses("none has the id 7", {**whole, next(t for t, n in whole.items() if n == 7): 7000})
    refuses("merges.txt:2: 'a b c' is not two tokens", pairs=[lines[0], "a b c"])
    refuses("merges.txt:2: 'q' \\+ '@' is not in .*vocab.json", pairs=[lines[0], "q @"])
    merges.unlink()
    with pytest.raises(InputError, match="no .*merges.txt: vocab.json needs merges.txt beside it"):
        tokenizer.load(vocabulary)


@pytest.fixture
def plain(trained):
    library = tokenizers.Tokenizer.from_str(trained.to_str())
    library.add_special_tokens(["<s>", "</s>", "<pad>", "<|im_end|>"])
    return tokenizer.FileTokenizer(library.to_str())


@pytest.mark.parametrize(
    ("config", "roles"),
    [
        ({}, ("<s>", "</s>", "<pad>")),
        ({"eos_token": "<|im_end|>"}, ("<s>", "<|im_end|>", "<pad>")),
        ({"bos_token": None, "pad_token": {"content": "</s>", "special": True}}, (None, "</s>", "</s>")),
        ({"bos_token": "a"}, ("a", "</s>", "<pad>")),
    ],
)
def test_tokenizer_config_decides_and_what_we_save_keeps_it(plain, config, roles, tmp_path):
    plain.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    one = tokenizer.load(tmp_path)
    expected = tuple(None if token is None else plain.find(token) for token in roles)
    assert (one.bos, one.eos, one.pad) == expected
    alone = tmp_path / "alone"
    alone.mkdir()
    again = tokenizer.load(one.save(alone))
    assert (again.bos, again.eos, again.pad, again.sha256) == (*expected, one.sha256)
    assert (
        tokenizers.Tokenizer.from_file(str(alone / "tokenizer.json")).encode("hello").ids
        == one.encode("hello").tolist()
    )
    assert one.decode([number for number in expected if number is not None]) == ""
    if not config:
        assert one.content == plain.content


def test_a_token_that_is_not_there_counts_as_none(plain, tmp_path):
    plain.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<nothing>"}')
    with pytest.warns(UserWarning, match="bos_token '<nothing>' is not in the vocabulary"):
        one = tokenizer.load(tmp_path)
    assert (one.bos, one.eos) == (None, plain.eos)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(InputError, match="tokenizer_config.json can't be read"):
        tokenizer.load(tmp_path)


def test_ids_said_in_another_way(plain):
    one = plain.with_special_ids(SpecialIds(None, 3, None))
    assert (one.bos, one.eos, one.pad, one.first_id) == (None, 3, None, 3)
    np.testing.assert_array_equal(one.encode("hello"), plain.encode("hello"))
