"""What Gloo, which joins CPU devices of several processes, prints of its own: its threads write over one another."""

from __future__ import annotations

import re

_PIECE = r"\[Gloo\]|Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :|\d+|\s"


def without_gloo(said: str, prefix: str = "") -> str:
    """`said` without the lines that hold nothing but pieces of Gloo's.

    Args:
      prefix: a pattern of what a launcher puts in front of every line.
    """
    lines = said.splitlines(keepends=True)
    return "".join(line for line in lines if not re.fullmatch(rf"(?:{prefix})?(?:{_PIECE})*", line) or not line.strip())
