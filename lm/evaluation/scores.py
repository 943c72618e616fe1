"""What an evaluation finds: totals, the totals of each document, and the error of their ratio.

Shapes: D documents.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class PerDocument:
    """The totals of each document, in the order of the text. Words and bytes are those of what is scored."""

    name: Callable[[int], str]
    nats_D: np.ndarray
    tokens_D: np.ndarray
    words_D: np.ndarray
    bytes_D: np.ndarray

    def __len__(self) -> int:
        return len(self.nats_D)

    def records(self) -> Iterator[dict[str, Any]]:
        """A document each, as eval.py writes them; nats that are no finite number are None."""
        for i in range(len(self)):
            counts = {name: int(getattr(self, f"{name}_D")[i]) for name in ("tokens", "words", "bytes")}
            yield {"id": self.name(i), "nats": finite(float(self.nats_D[i])), **counts}


@dataclasses.dataclass(frozen=True)
class Scores:
    """Totals of one evaluation, and how they were taken. The ratios are computed once, from the totals."""

    nats: float
    tokens: int
    words: int
    bytes: int
    documents: int
    standard_error: float | None
    """Of nats_per_token over documents, by the ratio estimator; None for fewer than two documents."""
    protocol: Mapping[str, Any]
    seconds: float
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    per_document: PerDocument | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return _exp(self.nats / self.tokens)

    @property
    def word_perplexity(self) -> float | None:
        return _exp(self.nats / self.words) if self.words else None

    @property
    def bits_per_byte(self) -> float:
        return self.nats / self.bytes / math.log(2)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """The result as eval.py writes it; JSON has no NaN and no infinity, so these are None."""
        values = {
            **{name: getattr(self, name) for name in ("nats", "tokens", "words", "bytes", "documents")},
            **{name: getattr(self, name) for name in ("nats_per_token", "perplexity", "word_perplexity")},
            **{name: getattr(self, name) for name in ("bits_per_byte", "standard_error")},
            "protocol": dict(self.protocol),
            "model": dict(self.model),
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
        }
        return {name: finite(value) for name, value in values.items()}


def ratio_standard_error(values_D: np.ndarray, sizes_D: np.ndarray) -> float | None:
    """Standard error of Σ values / Σ sizes over the documents that have a size: the ratio estimator (Cochran 1977,
    section 2.11). None for fewer than two."""
    documents = np.count_nonzero(sizes_D)
    if documents < 2 or not np.isfinite(values_D).all():
        return None
    residual_D = values_D - values_D.sum() / sizes_D.sum() * sizes_D
    return float(np.sqrt(documents / (documents - 1) * np.sum(residual_D**2)) / sizes_D.sum())


def finite(value: Any) -> Any:
    """The value itself, but None for a float that is NaN or infinite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _exp(nats: float) -> float:
    return math.inf if nats > 700 else math.exp(nats)  # exp(710) overflows
