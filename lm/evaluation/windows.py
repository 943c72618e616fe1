"""The windows that a document is scored in, and rows of a fixed shape that windows are packed into.

Shapes: R rows, W positions in a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from lm.data.pipeline import Batch


class Window(NamedTuple):
    """Input ids [begin, end) of a document with its BOS. Targets are one further; the last `scored` of them count."""

    begin: int
    end: int
    scored: int


def windows(length: int, *, window: int, stride: int) -> Iterator[Window]:
    """The windows of a document of `length` ids, its BOS included: lm-evaluation-harness's rolling windows.

    The first scores up to `window` targets. Each later one scores the next `stride`, its input being the `window` ids
    that end just before its last target, so that a target has at least `window - stride + 1` ids before it.
    """
    targets = length - 1
    done = min(window, targets)
    if done > 0:
        yield Window(0, done, done)
    while done < targets:
        scored = min(stride, targets - done)
        done += scored
        yield Window(done - window, done, scored)


def windows_behind(ids: np.ndarray, unscored: int, *, window: int, stride: int) -> Iterator[Window]:
    """The windows of a document whose first `unscored` ids, at least one, are context alone."""
    for each in windows(len(ids), window=window, stride=stride):
        scored = min(each.scored, each.end + 1 - unscored)
        if scored > 0:
            yield each._replace(scored=scored)


class Piece(NamedTuple):
    """A window's place: `scored` targets of text number `text`, from its id number `first` on.

    They are the targets of `row` whose places stand in `Packed.columns_RW` from `begin` on.
    """

    text: int
    first: int
    scored: int
    row: int
    begin: int


class Packed(NamedTuple):
    """A batch of windows: weights are 1 where a target is scored. `columns_RW` lists these places of each row."""

    batch: Batch
    columns_RW: np.ndarray
    pieces: list[Piece]

    @property
    def scored(self) -> int:
        """Scored targets of the row that has most."""
        return max(piece.begin + piece.scored for piece in self.pieces)


def pack(texts: Iterable[tuple[int, np.ndarray, Window]], *, rows: int, length: int) -> Iterator[Packed]:
    """Batches of `rows` rows of `length` positions that hold the windows, in order. The last one may have empty rows.

    Windows that fit share a row, each a segment of its own with positions from 0: the model sees them apart.

    Args:
      texts: (number of the text, its ids, one of its windows), no window longer than `length`.
    """
    packed = _empty(rows, length)
    row = used = begin = segment = 0
    for text, ids, window in texts:
        size = window.end - window.begin
        assert size <= length, (size, length)
        if used + size > length:
            row, used, begin, segment = row + 1, 0, 0, 0
        if row == rows:
            yield packed
            packed, row = _empty(rows, length), 0
        segment += 1
        batch, place = packed.batch, (row, slice(used, used + size))
        batch.tokens_BT[place] = ids[window.begin : window.end]
        batch.targets_BT[place] = ids[window.begin + 1 : window.end + 1]
        batch.segments_BT[place] = segment
        batch.positions_BT[place] = np.arange(size)
        used += size
        columns = np.arange(used - window.scored, used)
        batch.weights_BT[row, columns] = 1
        packed.columns_RW[row, begin : begin + window.scored] = columns
        packed.pieces.append(Piece(text, window.end + 1 - window.scored, window.scored, row, begin))
        begin += window.scored
    if packed.pieces:
        yield packed


def _empty(rows: int, length: int) -> Packed:
    tokens, targets, segments, positions, columns = (np.zeros((rows, length), np.int32) for _ in range(5))
    batch = Batch(tokens, targets, np.zeros((rows, length), np.float32), segments, positions)
    return Packed(batch, columns, [])
