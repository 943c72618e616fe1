"""Models side by side on one text: the paired differences over its documents."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

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
    assert len(one) == len(two) and first.protocol["data_sha256"] == second.protocol["data_sha256"], "not one text"
    difference_D = two.nats_D - one.nats_D
    if _same_tokens(first, second, one, two):
        unit, sizes_D = "nats per token", one.tokens_D
    else:
        unit, sizes_D, difference_D = "bits per byte", one.bytes_D, difference_D / math.log(2)
    difference = math.fsum(difference_D) / int(sizes_D.sum()) if np.isfinite(difference_D).all() else math.nan
    error = ratio_standard_error(difference_D, sizes_D)
    return {"models": [i, j], "difference": finite(difference), "standard_error": error, "unit": unit}


def _same_tokens(first: Scores, second: Scores, one: PerDocument, two: PerDocument) -> bool:
    same = first.protocol["tokenizer_sha256"] == second.protocol["tokenizer_sha256"]
    return same and np.array_equal(one.tokens_D, two.tokens_D)
