"""Which part of a text is held out for validation when nothing says it: a fixed tenth."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def held_out(ids: Sequence[str]) -> frozenset[str]:
    """Of several documents those whose id hashes into a tenth, so that adding or reordering others moves none.

    Never empty and never all: among few documents the one with the smallest hash is held out, and the one with the
    largest is not.
    """
    assert len(ids) > 1, "one document is cut, not held out"
    ranked = sorted(ids, key=_hash)
    held = [name for name in ranked if _hash(name) * 10 < 2**256]
    return frozenset((held or ranked[:1])[: len(ranked) - 1])


def cut(text: str) -> int:
    """Of a single document the last tenth by characters: where it begins."""
    return len(text) * 9 // 10


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"held out {name}".encode()).digest())
