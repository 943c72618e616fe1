"""Paired differences: their standard error is that of the documents' own differences, not of two separate means."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lm.config import InputError
from lm.evaluation.comparison import compare
from lm.evaluation.scores import PerDocument, Scores, ratio_standard_error


def scores(nats_D, tokens_D, tokenizer, bytes_D=(40, 90, 35), names=("doc0", "doc1", "doc2")):
    columns = [np.array(column) for column in (nats_D, tokens_D, [5, 9, 4][: len(names)], bytes_D)]
    each = PerDocument(lambda i: names[i], *columns)
    error = ratio_standard_error(*columns[:2])
    totals = [column.sum().item() for column in columns]
    protocol = {"data_sha256": "text", "tokenizer_sha256": tokenizer}
    return Scores(*totals, 3, error, protocol, 1.0, {"path": "x"}, each)


ONE = scores([10.0, 40.0, 7.0], [5, 10, 4], "a")
TWO = scores([9.0, 37.0, 6.0], [5, 10, 4], "a")
OTHER = scores([12.0, 44.0, 8.0], [8, 15, 6], "b")


def test_one_tokenizer_in_nats_a_token():
    found = compare([ONE, TWO])
    assert [each["nats"] for each in found["models"]] == [57, 52]
    (pair,) = found["pairs"]
    assert pair["models"] == [0, 1] and pair["unit"] == "nats per token"
    assert pair["difference"] == pytest.approx(-5 / 19)
    differences, tokens = np.array([-1.0, -3.0, -1.0]), np.array([5, 10, 4])
    residual = differences + 5 / 19 * tokens
    assert pair["standard_error"] == pytest.approx(math.sqrt(3 / 2 * (residual @ residual)) / 19)
    unpaired = math.hypot(ONE.standard_error, TWO.standard_error)
    assert pair["standard_error"] < unpaired / 5, "what makes a document hard for both must cancel out"


def test_two_tokenizers_in_bits_a_byte():
    first, second, third = compare([ONE, TWO, OTHER])["pairs"]
    assert [first["unit"], second["unit"], third["unit"]] == ["nats per token", "bits per byte", "bits per byte"]
    assert second["models"] == [0, 2] and third["models"] == [1, 2]
    assert second["difference"] == pytest.approx(7 / 165 / math.log(2))
    assert second["difference"] == pytest.approx(OTHER.bits_per_byte - ONE.bits_per_byte)


def test_documents_that_one_model_has_no_room_for_are_left_out():
    fewer = scores([9.0, 6.0], [5, 4], "a", (40, 35), ("doc0", "doc2"))
    (pair,) = compare([ONE, fewer])["pairs"]
    assert pair["difference"] == pytest.approx(-2 / 9) and pair["unit"] == "nats per token"
    (other_way,) = compare([fewer, ONE])["pairs"]
    assert other_way["difference"] == pytest.approx(2 / 9)
    others = scores([9.0, 6.0, 1.0], [5, 4, 4], "a", names=("doc0", "doc2", "doc3"))
    (pair,) = compare([ONE, others])["pairs"]  # as many, and not the same
    assert pair["difference"] == pytest.approx(-2 / 9)
    with pytest.raises(InputError, match="no document that both have room for"):
        compare([scores([9.0], [5], "a", (40,), ("doc1",)), fewer])
    with pytest.raises(InputError, match="have the same name"):
        compare([ONE, scores([9.0, 6.0], [5, 4], "a", (40, 35), ("doc0", "doc0"))])


def test_numbers_that_are_none():
    broken = scores([math.nan, 44.0, 8.0], [5, 10, 4], "a")
    found = compare([ONE, broken])
    assert found["pairs"][0]["difference"] is None and found["pairs"][0]["standard_error"] is None
    assert found["models"][1]["perplexity"] is None
