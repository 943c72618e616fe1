"""Models side by side on one text: the paired differences over its documents."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.config import InputError
from lm.evaluation.scores import PerDocument, Scores, finite, ratio_standard_error

COLUMNS = ("nats_per_token", "perplexity", "word_perplexity", "bits_per_byte", "standard_error")
TOTALS = ("nats", "tokens", "words", "bytes", "documents")


def compare(scores: Sequence[Scores]) -> dict[str, Any]:
    """The models' numbers, and of every pair the difference, as eval.py writes them under "comparison".

    A difference is the second model's minus the first's over the same documents: below 0 the second is better. Of
    models that score the same tokens it is in nats a token; of others in bits a byte. Its standard error is the ratio
    estimator's over the documents' own differences, so what makes a document hard for both cancels out.
    """
    models = []
    for each in scores:
        numbers = {name: finite(getattr(each, name)) for name in (*TOTALS, *COLUMNS)}
        models.append({**each.model, **numbers, "protocol": dict(each.protocol)})
    pairs = [_difference(scores, i, j) for i, j in itertools.combinations(range(len(scores)), 2)]
    return {"models": models, "pairs": pairs}


def _difference(scores: Sequence[Scores], i: int, j: int) -> dict[str, Any]:
    first, second = scores[i], scores[j]
    one, two = first.per_document, second.per_document
    assert one is not None and two is not None, "scores of an evaluator have them"
    assert first.protocol["data_sha256"] == second.protocol["data_sha256"], "not one text"
    places_D, others_D = _common(one, two)
    difference_D = two.nats_D[others_D] - one.nats_D[places_D]
    if first.protocol["tokenizer_sha256"] == second.protocol["tokenizer_sha256"] and np.array_equal(
        one.tokens_D[places_D], two.tokens_D[others_D]
    ):
        unit, sizes_D = "nats per token", one.tokens_D[places_D]
    else:
        unit, sizes_D, difference_D = "bits per byte", one.bytes_D[places_D], difference_D / math.log(2)
    difference = math.fsum(difference_D) / int(sizes_D.sum()) if np.isfinite(difference_D).all() else math.nan
    error = ratio_standard_error(difference_D, sizes_D)
    return {"models": [i, j], "difference": finite(difference), "standard_error": error, "unit": unit}


def _common(one: PerDocument, two: PerDocument) -> tuple[np.ndarray, np.ndarray]:
    """Where in each the documents are that both score: learned positions may be too few for some in one of them."""
    places, others = ({each.name(i): i for i in range(len(each))} for each in (one, two))
    if list(places) == list(others) and len(one) == len(two):
        return np.arange(len(one)), np.arange(len(two))
    if len(places) < len(one) or len(others) < len(two):
        raise InputError("the models score different documents, and some have the same name: compare them on others")
    common = [name for name in places if name in others]
    if not common:
        raise InputError("the models score no document that both have room for: compare them on shorter ones")
    return np.array([places[name] for name in common]), np.array([others[name] for name in common])
