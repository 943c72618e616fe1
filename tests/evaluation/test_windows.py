"""Windows score each target once with the promised context, and packed rows hold just them."""

from __future__ import annotations

import numpy as np
import pytest

from lm.evaluation.windows import pack, windows, windows_behind


@pytest.mark.parametrize("length", [0, 1, 2, 5, 16, 17, 18, 40, 41, 100])
@pytest.mark.parametrize("stride", [1, 3, 16])
def test_windows_are_the_rolling_windows_of_the_harness(length, stride):
    """Each target once, in order; never more than 16 inputs; at least 16 - stride + 1 ids before it where there are."""
    found = list(windows(length, window=16, stride=stride))
    scored = [i for w in found for i in range(w.end - w.scored + 1, w.end + 1)]
    assert scored == list(range(1, length))
    for number, w in enumerate(found):
        assert 0 <= w.begin < w.end <= w.begin + 16
        assert number == 0 or w.end - w.begin == 16
        for target in range(w.end - w.scored + 1, w.end + 1):
            assert target - w.begin >= min(16 - stride + 1, target)


@pytest.mark.parametrize("unscored", [1, 5, 17, 39, 40])
def test_what_is_context_alone_is_not_scored(unscored):
    found = windows_behind(np.zeros(40), unscored, window=16, stride=7)
    scored = [i for w in found for i in range(w.end - w.scored + 1, w.end + 1)]
    assert scored == list(range(unscored, 40))


@pytest.mark.parametrize("rows", [1, 3])
def test_packed_rows_hold_the_windows(rows):
    """Each piece, read back from its row, has its inputs, its targets and nothing of its neighbours."""
    texts = [np.arange(n) + 100 * number for number, n in enumerate((3, 9, 2, 30, 8, 1, 5))]
    found = [(n, ids, w) for n, ids in enumerate(texts) for w in windows(len(ids), window=8, stride=3)]
    left = iter(found)
    for packed in pack(found, rows=rows, length=10):
        tokens, targets, weights, segments, positions, _ = packed.batch
        assert tokens.shape == packed.columns_RW.shape == (rows, 10)
        assert packed.scored == weights.sum(axis=1).max()
        for piece in packed.pieces:
            number, ids, window = next(left)
            columns = packed.columns_RW[piece.row, piece.begin : piece.begin + piece.scored]
            assert (piece.text, piece.scored) == (number, window.scored)
            np.testing.assert_array_equal(targets[piece.row, columns], ids[piece.first : piece.first + piece.scored])
            assert (weights[piece.row, columns] == 1).all()
            inputs = segments[piece.row] == segments[piece.row, columns[0]]
            np.testing.assert_array_equal(tokens[piece.row, inputs], ids[window.begin : window.end])
            np.testing.assert_array_equal(positions[piece.row, inputs], np.arange(window.end - window.begin))
        assert weights.sum() == sum(piece.scored for piece in packed.pieces)
    assert next(left, None) is None
