"""ROUGE (Lin 2004) of summaries, by rouge-score, and of the simplest summary of all: a document's first sentence.

Shapes: D documents, K kinds of ROUGE.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from importlib import metadata

import numpy as np

from lm.config import InputError
from lm.evaluation.bootstrap import interval
from lm.evaluation.measured import Measured

NAMES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_END = re.compile(r"""[.!?]["'”’)\]]*\s+(?=["'“‘(\[]*[A-Z0-9])""")
"""Of a sentence, with the space behind it: the next one begins with a capital or a digit."""
_ABBREVIATED = re.compile(r"(?:\b(?:e\.g|i\.e|al|cf|vs|etc|resp|approx|Fig|Eq|Sec|No|Dr|Mr|Mrs|Ms|St)|\b[A-Z])\.$")


def check_installed() -> None:
    """Raises InputError where rouge-score isn't."""
    if importlib.util.find_spec("rouge_score") is None:
        raise InputError("summaries are scored by rouge-score, which isn't there: pip install rouge-score")


def summary_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[Measured]:
    """F1 of ROUGE-1, -2, -L and -Lsum (whose sentences are lines), of stemmed words, averaged over documents.

    Args:
      references: of each document one or more, of which each kind takes the best.
    """
    check_installed()
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(NAMES, use_stemmer=True)
    pairs = zip(predictions, references, strict=True)
    each = [scorer.score_multi(several, prediction) for prediction, several in pairs]
    values_DK = np.array([[100 * scores[name].fmeasure for name in NAMES] for scores in each])
    D = len(values_DK)
    signature = f"f1|stemmer:yes|refs:best|version:{metadata.version('rouge-score')}"
    return [
        Measured(
            name, float(values_D.mean()), interval(values_D[:, None], lambda sums_K: float(sums_K[0]) / D), signature
        )
        for name, values_D in zip(NAMES, values_DK.T, strict=True)
    ]


def lead_sentence(text: str) -> str:
    """The first sentence of a text: up to a full stop, question or exclamation mark before a space and a capital.

    Abbreviations and initials end none; a line end does.
    """
    line = text.strip().split("\n", 1)[0].strip()
    for end in _END.finditer(line):
        sentence = line[: end.end()].rstrip()
        if not _ABBREVIATED.search(sentence):
            return sentence
    return line
