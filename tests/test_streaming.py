"""A text in pieces is the text, and a piece has whole characters."""

from __future__ import annotations

import numpy as np
import pytest

from lm import streaming
from lm.config import InputError, ModelConfig, RunConfig
from lm.data.tokenizer import ByteTokenizer
from lm.generation import TextModel, before, generate
from lm.nn import language_model, params
from lm.sampling import Sampling


@pytest.fixture(scope="module")
def model():
    cfg = ModelConfig(num_layers=1, d_model=16, num_heads=2, positions="rotary", init_std=0.4)
    cfg = RunConfig(model=cfg).resolve(258).model
    import jax

    tree = params.initialize(language_model.model_specs(cfg), jax.random.key(1))
    return TextModel(tree, cfg, ByteTokenizer(), None, 64)


def whole(model, prompt, **how):
    return generate(*model[:3], [prompt], **how)[0]


@pytest.mark.parametrize("stop", [(), ("e",), ("zz", "\ufffd\ufffd")])
def test_pieces_are_the_text(model, stop):
    how = {"max_tokens": 30, "sampling": Sampling(1.2), "seed": 3, "stop": stop}
    pieces = list(streaming.stream(model, "héllo", **how))
    assert "".join(pieces) == whole(model, "héllo", **how)
    assert all(pieces)


def fake_turns(text, by=1):
    """As if a model wrote the bytes of a text, one a turn."""
    ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def turns(*_, **__):
        for end in range(by, len(ids) + by, by):
            yield end >= len(ids), [ids[:end]]

    return turns


def pieces_of(model, monkeypatch, text, stop=()):
    monkeypatch.setattr(streaming, "turns", fake_turns(text))
    return list(streaming.stream(model, "x", max_tokens=99, sampling=Sampling(0.0), seed=0, stop=stop))


def test_a_piece_has_whole_characters(model, monkeypatch):
    assert pieces_of(model, monkeypatch, "aé👋漢b") == ["a", "é", "👋", "漢", "b"]


def test_what_may_become_a_stop_waits(model, monkeypatch):
    assert pieces_of(model, monkeypatch, "one END two", ("END",)) == ["o", "n", "e", " "]
    assert pieces_of(model, monkeypatch, "an ENEND", ("END",)) == ["a", "n", " ", "EN"]
    assert pieces_of(model, monkeypatch, "an EN", ("END",)) == ["a", "n", " ", "EN"]  # it never came
    assert pieces_of(model, monkeypatch, "wir für uns", ("für",)) == ["w", "i", "r", " "]  # ü has two bytes
    assert pieces_of(model, monkeypatch, "b漢👋漢", ("漢👋", "漢")) == ["b"]


@pytest.mark.parametrize(
    ("stop", "cut"), [(("bcd", "c"), "ab"), (("cd", "bcd"), "a"), (("x",), "abcde"), ((), "abcde"), (("e", "d"), "abc")]
)
def test_a_text_stops_at_what_was_complete_first(stop, cut):
    """Of those complete at once at the longest."""
    assert before("abcde", stop) == cut


def test_wrong_options_are_told_before_the_first_piece(model):
    how = {"max_tokens": 3, "sampling": Sampling(0.0), "seed": 0}
    with pytest.raises(InputError, match="temperature is -1"):
        streaming.stream(model, "a", **{**how, "sampling": Sampling(-1.0)})
    with pytest.raises(InputError, match="longer than the model's context of 64"):
        streaming.stream(model, "a" * 64, **how)
    with pytest.raises(InputError, match="empty text"):
        streaming.stream(model, "a", **how, stop=("",))
