"""How many bytes of a text each of its tokens stands for, from the spans that a library gives."""

from __future__ import annotations

import numpy as np


def bytes_of_spans(spans: np.ndarray, own: np.ndarray, total: int) -> np.ndarray:
    """Shares a text's bytes out to its tokens, int32 [tokens]: they add up to `total` where there is a token.

    Tokens whose spans overlap, as the byte tokens of one character do, share the bytes from the last to the first,
    each taking as many as it has of its own; what is over goes to the last. Bytes in no span go to the token before.

    Args:
      spans: [tokens, 2], first byte and end of each token in the text, in order.
      own: [tokens], bytes that each token has by itself.
      total: bytes of the text.
    """
    if not len(spans):
        return np.zeros(0, np.int32)
    starts = np.maximum.accumulate(spans[:, 0])
    ends = np.maximum.accumulate(spans[:, 1])
    firsts = np.flatnonzero(np.concatenate([[True], starts[1:] >= ends[:-1]]))
    bounds = np.append(starts[firsts], total)
    bounds[0] = 0
    lengths = np.diff(bounds)
    members = np.diff(np.append(firsts, len(spans)))
    sizes = np.zeros(len(spans), np.int32)
    sizes[firsts[members == 1]] = lengths[members == 1]
    for group in np.flatnonzero(members > 1):
        left, last = int(lengths[group]), int(firsts[group] + members[group]) - 1
        for token in range(last, int(firsts[group]) - 1, -1):
            sizes[token] = min(int(own[token]), left)
            left -= int(sizes[token])
        sizes[last] += left
    return sizes


def byte_offsets(text: str) -> np.ndarray:
    """Where each character of a text starts in its UTF-8, and where the last one ends."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate([[0], np.cumsum(widths)])
