"""What the encoder of an encoder-decoder reads.

Shapes: B batch, S source position.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Source(NamedTuple):
    """Rows of source ids, int32, laid out as those of targets: a pair has the same segment number on both sides.

    NumPy arrays on the host and jax.Array on the devices.
    """

    tokens_BS: Any
    segments_BS: Any
    """Pieces numbered from 1, 0 for padding: a target's token sees the source of its own segment alone."""
    positions_BS: Any
    """From 0 in each piece."""
