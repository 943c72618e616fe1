"""How the next token is chosen from logits: the best, or drawn from a distribution that is cut to the likelier ones.

Shapes: B rows, V vocabulary rows.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import InputError

Array = jax.Array


class Numbers(NamedTuple):
    """The numbers of a Sampling, float32, that aren't compiled in."""

    temperature: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any


class Sampling(NamedTuple):
    """How the next token is chosen. temperature 0 is greedy; of the others None is off. They apply in this order:

    repetition_penalty: logits of tokens that the row has already, prompt included, are divided by it if positive and
      multiplied if negative (Keskar et al. 2019, arXiv:1909.05858): above 1 they become less likely.
    temperature: logits are divided by it.
    top_k: the k likeliest are kept.
    top_p: of these the fewest whose probabilities reach p (Holtzman et al. 2020, arXiv:1904.09751).
    min_p: of these all that have at least min_p times the probability of the likeliest (Nguyen et al. 2024,
      arXiv:2407.01082).
    """

    temperature: float
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def validate(self) -> Sampling:
        """Raises InputError on a value out of range, and on one without effect; returns the object itself."""
        if not 0 <= _single(self.temperature) < math.inf or (self.temperature and not _single(self.temperature)):
            raise InputError(f"temperature is {self.temperature}: use 0 for greedy, or more, but finite in float32")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}: use 1 or more, or None")
        if self.top_p is not None and not 0 < _single(self.top_p) <= 1:
            raise InputError(f"top_p is {self.top_p}: use a probability above 0 (in float32) and up to 1, or None")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise InputError(f"min_p is {self.min_p}: use a share from 0 to 1, or None")
        check_repetition_penalty(self.repetition_penalty)
        for name in ("top_k", "top_p", "min_p"):
            if self.temperature == 0 and getattr(self, name) is not None:
                raise InputError(
                    f"{name} is {getattr(self, name)}, but temperature 0 always takes the likeliest token: use a "
                    f"temperature above 0, or leave {name} out"
                )
        return self

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def form(self) -> Sampling:
        """What is compiled: which options are on, and top_k."""

        def on(value: float | None, off: float) -> float | None:
            return None if value is None or value == off else 1.0

        return Sampling(
            float(not self.greedy), self.top_k, on(self.top_p, 1), on(self.min_p, 0), on(self.repetition_penalty, 1)
        )

    def numbers(self) -> Numbers:
        values = (self.temperature or 1.0, self.top_p, self.min_p, self.repetition_penalty)
        return Numbers(*(np.float32(1.0 if value is None else value) for value in values))


def check_repetition_penalty(value: float | None) -> None:
    """Raises InputError for one that is out of range."""
    if value is not None and not 0 < _single(value) < math.inf:
        raise InputError(f"repetition_penalty is {value}: use a number above 0, finite in float32, or None")


def _single(value: float) -> float:
    """As it is computed with."""
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def pick(
    logits_BV: Array, keys_B: Array | None, numbers: Numbers, form: Sampling, seen_BV: Array | None = None
) -> Array:
    """The next token of each row, int32: the best, or drawn by its own key.

    Args:
      form: of `Sampling.form`. numbers: of `Sampling.numbers`.
      seen_BV: whether a row has a token already; for a repetition penalty alone.
    """
    if form.repetition_penalty is not None:
        assert seen_BV is not None
        logits_BV = penalized(logits_BV, seen_BV, numbers.repetition_penalty)
    if form.greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    assert keys_B is not None
    return jax.vmap(jax.random.categorical)(keys_B, cut(logits_BV, numbers, form)).astype(jnp.int32)


def penalized(scores_BV: Array, seen_BV: Array, penalty: Array) -> Array:
    """Logits or log-probabilities with the repetition penalty on tokens that a row has already."""
    less_BV = jnp.where(scores_BV < 0, scores_BV * penalty, scores_BV / penalty)
    return jnp.where(seen_BV, less_BV, scores_BV)


def cut(logits_BV: Array, numbers: Numbers, form: Sampling) -> Array:
    """What is drawn from: logits at the temperature, the largest being 0, and -inf for what isn't kept.

    All that are as likely as the last that is kept are kept.
    """
    # Subtracted first: none overflows.
    logits_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / numbers.temperature
    if form.top_k is not None and form.top_k < logits_BV.shape[-1]:
        least_B1 = jax.lax.top_k(logits_BV, form.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    if form.top_p is not None:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
        least_B1 = jnp.min(jnp.where(before_BV < numbers.top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    if form.min_p is not None:
        logits_BV = jnp.where(logits_BV >= jnp.log(numbers.min_p), logits_BV, -jnp.inf)
    return logits_BV
