import io
import json
import pickle
import sys

import numpy as np
import pytest

from lm.config import InputError
from lm.data import tokenizer
from tests.data.tokenizers.test_bytes_per_token import TEXTS
from tests.data.tokenizers.test_tokenizer_files import random_texts


def test_without_the_library_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\n\x0e\n\x05<unk>")
    with pytest.raises(InputError, match=r"tokenizer.model needs .*: pip install 'lm\[sentencepiece\]'"):
        tokenizer.load(path)


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def one(request):
    """bpe: as Llama's. unigram: as T5's, with NFKC and unknown characters."""
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = [f"the king {number} said ab to the queen" for number in range(300)]
    content = io.BytesIO()
    kind = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=content, vocab_size=320 if request.param == "bpe" else 50,
        model_type=request.param, pad_id=3, minloglevel=2, user_defined_symbols=["<ud>"],
        **(kind if request.param == "bpe" else {}),
    )  # fmt: skip
    return tokenizer.SentencePieceTokenizer(content.getvalue())


def test_ids_are_the_library_s(one):
    assert (one.bos, one.eos, one.pad, one.first_id) == (1, 2, 3, 1)
    for text, ids in zip(TEXTS, one.encode_batch(TEXTS), strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == one.encode(text).tolist() == one._library.encode(text)
        assert not {one.bos, one.eos, one.pad} & set(ids.tolist())
    assert one.decode([one.bos, *one.encode("the king"), one.eos, one.vocab_size + 5]) == "the king"
    assert one.encode_batch([]) == []


def test_bytes_per_token_add_up(one):
    for text in (*TEXTS, *random_texts(5, 200)):
        ids, sizes = one.encode(text), one.bytes_per_token(text)
        assert (sizes.dtype, sizes.shape) == (np.int32, ids.shape)
        assert sizes.sum() == (len(text.encode()) if len(ids) else 0), text
    if one._library.is_byte(one.encode("👩")[-1].item()):
        assert one.bytes_per_token("👩").tolist() == [0, 1, 1, 1, 1]


def test_it_is_kept_as_it_is(one, tmp_path):
    saved = one.save(tmp_path)
    assert saved.name == one.file_name == "tokenizer.model"
    again = tokenizer.load(tmp_path)
    assert (again.sha256, again.vocab_size, again.bos) == (one.sha256, one.vocab_size, 1)
    assert pickle.loads(pickle.dumps(one)).encode("the king").tolist() == one.encode("the king").tolist()
    assert (one.cuts, one.lossless, one.split_at_cuts("a b " * 9, 4)) == (None, False, ["a b " * 9])


def test_tokenizer_config_decides_and_what_we_save_keeps_it(one, tmp_path):
    one.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": "<pad>"}))
    other = tokenizer.load(tmp_path)
    assert (other.bos, other.eos, other.pad) == (None, 3, 3)
    alone = tmp_path / "alone"
    alone.mkdir()
    again = tokenizer.load(other.save(alone))
    assert (again.bos, again.eos, again.pad, again.sha256) == (None, 3, 3, other.sha256)
    for text in TEXTS:
        assert again.encode(text).tolist() == one.encode(text).tolist()
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<ud>"}')
    with pytest.warns(UserWarning, match="pad_token '<ud>'"):
        assert tokenizer.load(tmp_path).pad is None


def test_a_model_that_can_t_be_read(tmp_path):
    pytest.importorskip("sentencepiece")
    path = tmp_path / "x.model"
    path.write_bytes(b"\n\x0e\n\xff\xff")
    with pytest.raises(InputError, match="x.model is not a SentencePiece model"):
        tokenizer.load(path)
