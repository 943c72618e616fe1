"""A metric of texts that a model wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

TITLES = {
    "bleu": "BLEU",
    "chrf": "chrF",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
}
"""What metrics are called where people read them."""


class Interval(NamedTuple):
    """Between these the metric lies with a confidence of 95 %."""

    low: float
    high: float


class Measured(NamedTuple):
    """A metric of a set of texts, from 0 to 100, higher is better.

    `interval` is None for fewer than two documents; `signature` says by what and with which settings it was computed.
    """

    name: str
    value: float
    interval: Interval | None
    signature: str


def titled(metrics: Mapping[str, float]) -> str:
    """Metrics on one line; of ROUGE-L the form that is in use for texts of one line."""
    return "  ".join(f"{TITLES[name]} {value:.2f}" for name, value in metrics.items() if name != "rougeLsum")
