"""Confidence of a score over documents, by resampling them (Efron & Tibshirani 1993, chapter 13; for BLEU Koehn 2004).

Shapes: D documents, K statistics of each, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lm.evaluation.measured import Interval

RESAMPLES = 1000
SEED = 0
CONFIDENCE = 0.95


def interval(statistics_DK: np.ndarray, score: Callable[[np.ndarray], float]) -> Interval | None:
    """The percentile interval of a score of summed statistics; None for fewer than two documents.

    Each resample draws D documents with replacement; only how often each was drawn matters, so its sums are one product
    of counts and statistics. The draws are the same at every call: metrics of the same documents are of the same
    resamples.

    Args:
      statistics_DK: what each document adds to the sums, float64.
      score: of sums_K.
    """
    D = len(statistics_DK)
    if D < 2:
        return None
    random = np.random.default_rng(SEED)
    counts = (np.bincount(random.integers(D, size=D), minlength=D) for _ in range(RESAMPLES))
    scores_R = [score(counts_D @ statistics_DK) for counts_D in counts]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(scores_R, (tail, 1 - tail)).tolist()
    return Interval(low, high)
