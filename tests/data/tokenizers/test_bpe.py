import random
import signal
import subprocess
import sys
import time

import pytest

from lm.config import InputError
from lm.data.tokenizer import BOS, EOS, load, train_bpe

CODE = "def encode(self, text):\n    return self.table[text]\n\n\nclass Table(dict):\n    pass\n" * 20
HARD = (
    "\u2581 and \u2581\u2581 are spaces elsewhere",
    "<0x41> <0x0A>< 0x41 >" * 3,
    "👩‍👩‍👧‍👦 中文字符 e\u0301\x00\ufeff\U0010ffff",
    " \t\n  \r\n ",
)


def test_today_s_files_stay_as_they_are():
    """Published numbers were made with them: tokenizers 0.22 and 0.23 write the same."""
    assert train_bpe([CODE], 300).sha256 == "c2c272fb7d5b62c35b39b45c0f582fdbf3eb43ec13e1bea682a1d6cb5e2691e4"


@pytest.mark.parametrize("text", HARD)
def test_byte_fallback_gives_every_text_back(text):
    for texts in ([CODE], [CODE, *HARD], []):
        one = train_bpe(texts, 420, byte_fallback=True)
        assert one.lossless
        assert one.decode(one.encode(text)) == text
        assert one.bytes_per_token(text).sum() == len(text.encode())


def test_byte_fallback_has_characters_for_tokens_and_bytes_for_the_rest():
    one = train_bpe([CODE + "é" * 40], 400, byte_fallback=True)
    assert [one._library.id_to_token(number) for number in one.encode("é")] == ["é"]
    assert one.encode("☃").tolist() == list("☃".encode())  # the byte tokens are the first ids
    assert one.encode("return").size < 6
    assert one.bytes_per_token("é☃").tolist() == [2, 1, 1, 1]


def test_rare_characters_take_no_room():
    text = "abcdefgh " * 1000 + "☃"
    tokens = {
        train._library.id_to_token(number)
        for train in [train_bpe([text], 300, byte_fallback=True)]
        for number in range(300)
    }
    assert "a" in tokens and "☃" not in tokens


def test_which_characters_have_tokens_does_not_depend_on_the_run():
    """The library breaks ties by a hash map's order."""
    letters = [chr(number) for number in range(0x4E00, 0x4E80)]
    texts = ["".join(letters)]
    assert len({train_bpe(texts, 300, byte_fallback=True).sha256 for _ in range(5)}) == 1


@pytest.mark.parametrize("byte_fallback", [False, True])
def test_special_tokens_come_last_before_bos_and_eos(byte_fallback, tmp_path):
    one = train_bpe([CODE], 320, byte_fallback=byte_fallback, special_tokens=("<pad>", "<|user|>"))
    size = one.vocab_size
    assert [one.find(token) for token in ("<pad>", "<|user|>", BOS, EOS)] == [size - 4, size - 3, size - 2, size - 1]
    assert (one.pad, one.bos, one.eos) == (size - 4, size - 2, size - 1)
    assert max(one.encode("<pad><|user|>" + BOS)) < size - 4
    assert one.decode([*one.encode("ab"), size - 3, size - 4]) == "ab"
    assert load(one.save(tmp_path)).pad == one.pad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 10**20}, "is too large: use fewer than 16,777,216"),
        ({"vocab_size": 257}, "257 is too small: the bytes and 2 special tokens need at least 258"),
        ({"vocab_size": 258, "special_tokens": ("<a>",)}, "need at least 259"),
        ({"vocab_size": 300, "special_tokens": ("<a>", "<a>")}, "must be different"),
        ({"vocab_size": 300, "special_tokens": (BOS,)}, "must be different"),
        ({"vocab_size": 300, "special_tokens": ("",)}, "not empty"),
        ({"vocab_size": 300, "special_tokens": ("return",)}, "'return' is a word of the text too"),
    ],
)
def test_what_can_t_be_trained(arguments, message):
    with pytest.raises(InputError, match=message):
        train_bpe(["return " * 100], **arguments)


def test_random_texts_come_back():
    draw = random.Random(0)
    one = train_bpe([CODE], 350, byte_fallback=True)
    for _ in range(300):
        text = "".join(chr(draw.choice([draw.randrange(128), draw.randrange(0x300), 0x1F600])) for _ in range(30))
        assert one.decode(one.encode(text)) == text


@pytest.mark.parametrize("text", ["abcdefghij" * 100_000, "\n" * 500_000, "ab " + "x" * 200_000 + " ab"])
def test_text_without_breaks_is_trained_on_in_seconds(text):
    trained = train_bpe([text], 270)
    assert trained.decode(trained.encode(text[:1000])) == text[:1000]


def test_ctrl_c_ends_training_at_once(tmp_path):
    program = (
        "import random, signal; from lm.data.tokenizers.bpe import train_bpe\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "text = ' '.join(str(random.Random(n).random()) for n in range(300_000))\n"
        "print('begun', flush=True)\n"
        "try: train_bpe([text] * 20, 5000)\n"
        "except KeyboardInterrupt: import os; os._exit(130)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"begun\n"
    time.sleep(0.5)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert time.monotonic() - begin < 3
