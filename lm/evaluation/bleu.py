"""BLEU (Papineni et al. 2002) and chrF (Popović 2015) of translations, by sacrebleu (Post 2018) with its signatures.

Shapes: D documents, K statistics of each.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.config import InputError
from lm.evaluation.bootstrap import interval
from lm.evaluation.measured import Measured

NAMES = ("bleu", "chrf")


def check_installed() -> None:
    """Raises InputError where sacrebleu isn't."""
    if importlib.util.find_spec("sacrebleu") is None:
        raise InputError("translations are scored by sacrebleu, which isn't there: pip install sacrebleu")


def translation_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[Measured]:
    """Corpus BLEU by the tokenizer 13a and chrF2, both against all references of a document.

    Args:
      references: of each document one or more; their number may differ.
    """
    check_installed()
    from sacrebleu.metrics import BLEU, CHRF

    streams = list(itertools.zip_longest(*references))  # sacrebleu wants a list a reference, None where there is none
    kinds = zip(NAMES, (BLEU(), CHRF()), strict=True)
    return [_measured(name, metric, predictions, streams) for name, metric in kinds]


def _measured(name: str, metric: Any, predictions: Sequence[str], streams: list[tuple[str | None, ...]]) -> Measured:
    """The corpus score. These three methods are what sacrebleu's metrics offer its own resampling, which would hold
    all resamples of all documents at once."""
    statistics = metric._extract_corpus_statistics(predictions, streams)
    value = metric._aggregate_and_compute(statistics).score
    statistics_DK = np.array(statistics, np.float64)
    bounds = interval(statistics_DK, lambda sums_K: metric._compute_score_from_stats(sums_K.tolist()).score)
    return Measured(name, value, bounds, str(metric.get_signature()))
