"""Bits per byte need the bytes of the text as it is, whatever a tokenizer makes of it."""

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from lm.data import tokenizer
from lm.data.tokenizers.surfaces import byte_offsets, bytes_of_spans
from tests.data.tokenizers.test_tokenizer_files import random_texts

TEXTS = (
    "",
    " ",
    "   ab   ab  ",
    "ab\u2581ab",
    "👩‍👩‍👧‍👦🏳️‍🌈",
    "中文ab，",
    "e\u0301a\u0301\u0302 \u212b ﬁ ½ ①",
    "\x00\x01a\x7f\ufeff\u2028\u200b",
    "<s>ab</s><unk>",
)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def metaspace(*, byte_fallback, normalizer=None, prepend="always"):
    tokens = ["<unk>", *BYTES, "▁", "a", "b", "é", "ab", "▁a", "f", "i"]
    merges = [("a", "b"), ("▁", "a")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    library = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback)
    )
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    if normalizer is not None:
        library.normalizer = normalizer
    library.add_special_tokens(["<unk>"])
    return library


def byte_level(*, normalizer=None, prefix=False):
    library = tokenizers.Tokenizer.from_str(tokenizer.ByteTokenizer().content.decode())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    library.post_processor = processors.ByteLevel(trim_offsets=True)
    if normalizer is not None:
        library.normalizer = normalizer
    return library


def word_piece():
    library = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "ab": 3}, unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer()
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return library


KINDS = {
    "fallback": lambda: metaspace(byte_fallback=True),
    "first": lambda: metaspace(byte_fallback=True, prepend="first"),
    "unknown": lambda: metaspace(byte_fallback=False),
    "NFKC": lambda: metaspace(byte_fallback=True, normalizer=normalizers.NFKC()),
    "prepend": lambda: metaspace(byte_fallback=True, normalizer=normalizers.Prepend("▁")),
    "letters": byte_level,
    "letters, NFC": lambda: byte_level(normalizer=normalizers.NFC()),
    "letters, NFKD": lambda: byte_level(normalizer=normalizers.NFKD()),
    "letters, prefix": lambda: byte_level(prefix=True),
    "letters, strip": lambda: byte_level(normalizer=normalizers.Strip()),
    "words": word_piece,
}


@pytest.mark.parametrize("kind", KINDS)
def test_they_add_up_to_the_text(kind):
    one = tokenizer.FileTokenizer(KINDS[kind]().to_str())
    for text in (*TEXTS, *random_texts(4, 200)):
        ids, sizes = one.encode(text), one.bytes_per_token(text)
        assert (sizes.dtype, sizes.shape) == (np.int32, ids.shape)
        assert sizes.min(initial=0) >= 0
        assert sizes.sum() == (len(text.encode()) if len(ids) else 0), text


def sizes(kind, text):
    one = tokenizer.FileTokenizer(KINDS[kind]().to_str())
    tokens = [one._library.id_to_token(number) for number in one.encode(text)]
    return list(zip(tokens, one.bytes_per_token(text).tolist(), strict=True))


def test_each_token_has_its_own():
    assert sizes("fallback", "ab") == [("▁", 0), ("ab", 2)]
    assert sizes("fallback", " ab") == [("▁", 1), ("ab", 2)]  # Metaspace adds none to a space
    assert sizes("fallback", "é👩")[-5:] == [("é", 2), *((BYTES[byte], 1) for byte in "👩".encode())]
    assert sizes("unknown", "a中文b")[-2:] == [("<unk>", 6), ("b", 1)]
    assert sizes("letters, prefix", "a é") == [("Ġ", 0), ("a", 1), ("Ġ", 1), ("Ã", 1), ("©", 1)]
    assert sizes("letters, NFC", "e\u0301a") == [("Ã", 1), ("©", 2), ("a", 1)]  # three bytes written as two
    assert [size for _, size in sizes("letters, NFKD", "é")] == [0, 1, 1]
    assert sizes("words", "ab  a") == [("ab", 4), ("a", 1)]  # white space of no token counts for the one before


def test_spans_that_overlap_share_their_bytes():
    spans = np.array([(0, 0), (0, 1), (1, 5), (1, 5), (1, 5), (1, 5), (7, 9)])
    assert bytes_of_spans(spans, np.array([1, 1, 1, 1, 1, 1, 2]), 10).tolist() == [0, 1, 1, 1, 1, 3, 3]
    assert bytes_of_spans(np.zeros((0, 2), np.int64), np.zeros(0, np.int64), 3).tolist() == []
    assert byte_offsets("aé中👩").tolist() == [0, 1, 3, 6, 10]
