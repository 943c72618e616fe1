"""Which component of a mixture each row of the training text comes from: a function of the row's number."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


class Mixture:
    """Components interleaved as evenly as their weights allow, in whole numbers, so that shares are exact.

    Of any first n rows a component has its share n w / Σ w to within as many rows as there are components. The rule
    is nested: of the n rows that components k, k + 1, ... have together, those after k have ⌊n W'/W⌋, where W and W'
    are the sums of weights with and without k; none of these counts ever falls as n grows, so that a row more is a row
    more of exactly one component.
    """

    def __init__(self, weights: Sequence[float | Fraction]):
        exact = [Fraction(str(weight)) for weight in weights]  # 0.7 is 7/10, not the float closest to it
        assert exact and min(exact) > 0
        self._later = [(sum(exact[k + 1 :]) / sum(exact[k:])).as_integer_ratio() for k in range(len(exact))]

    def locate(self, row: int) -> tuple[int, int]:
        """The component of a row, and how many of the rows before it are of that component."""
        before, after = row, row + 1
        for component, (part, whole) in enumerate(self._later):
            left_before, left_after = before * part // whole, after * part // whole
            if left_before == left_after:
                return component, before - left_before
            before, after = left_before, left_after
        raise AssertionError("the last component leaves none")

    def counts(self, rows: int) -> list[int]:
        """How many of the first rows each component has."""
        found = []
        for part, whole in self._later:
            left = rows * part // whole
            found.append(rows - left)
            rows = left
        return found
