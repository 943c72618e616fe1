"""Plans of rows of pairs: which pairs each row holds, worked out once and kept on disk.

Shapes: K pairs that are kept, N rows, P pieces of some rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from lm.config import InputError
from lm.data import cache, pair_bins
from lm.data.column import Column
from lm.data.pairs import Counts, Kept, Limits, PairStore, keep

VERSION = 1
PIECE = np.dtype(
    [("source_start", "<i8"), ("target_start", "<i8"), ("source", "<i4"), ("target", "<i4"), ("whole", "?")]
)
"""A pair: where the ids that are read of its sides begin in their stores, how many they are, BOS and EOS not counted,
and whether EOS follows the target's."""


class PairPlan:
    """Rows of pairs; each pair that is kept is in one of them.

    Attributes:
        counts: what was left out and cut.
        source_tokens, target_tokens: that an epoch has, EOS included.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        try:
            described = json.loads((directory / "plan.json").read_text(encoding="utf-8"))
            self.counts = Counts(**described["counts"])
            self._rows, self._pairs = int(described["rows"]), int(described["pairs"])
            self.source_tokens, self.target_tokens = int(described["source_tokens"]), int(described["target_tokens"])
            self._limits = described["limits"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged() from error
        self._firsts = Column(directory / "rows.bin", np.int64, self._rows + 1)
        self._pieces = Column(directory / "pieces.bin", PIECE, self._pairs)

    def __len__(self) -> int:
        return self._rows

    @property
    def pairs(self) -> int:
        """That an epoch has."""
        return self._pairs

    def pieces(self, rows_B: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """How many pairs each of some rows has, and these as PIECE, row after row."""
        found = []
        for row in rows_B:
            first, last = self._firsts[row : row + 2].tolist()
            found.append(self._pieces[first:last] if 0 <= first <= last else self._pieces[:0])
        counts = np.array([len(each) for each in found])
        every = np.concatenate(found)
        sides = np.stack([every["source"], every["target"]])
        if counts.min() < 1 or sides.min() < 1 or (sides.max(1) > self._limits).any():
            raise self._damaged()
        return counts, every

    def _damaged(self) -> InputError:
        folder = self._directory
        return InputError(f"the plan of rows in {folder} is damaged: delete {folder} and start again, it is made anew")


def plan_of(store: PairStore, limits: Limits, *, packing: str, say: Callable[[str], None] | None = None) -> PairPlan:
    """The plan of a store, from the cache or made now; with packing "padded" each pair has a row of its own.

    Raises InputError where the limits leave no pair.
    """
    if limits.source <= (store.sources.eos is not None):
        raise InputError(f"data.source_context is {limits.source}, and EOS takes that: use 2 or more")
    recipe = json.dumps([VERSION, *(side.fingerprint for side in store), limits, packing])
    directory = cache.directory("plans") / f"pairs-{hashlib.sha256(recipe.encode()).hexdigest()[:32]}"
    if not directory.exists():
        if say is not None:
            row = f"{limits.source:,} source and {limits.target:,} target tokens"
            say(f"packing    {len(store.targets):,} pairs into rows of {row}, once")
        try:
            with cache.building(directory) as scratch:
                _write(scratch, store, limits, packing)
        except OSError as error:
            raise InputError(
                f"the plan of rows of {store.source} can't be written under {directory.parent}: {error.strerror}; make "
                "room, or set LM_CACHE to another folder"
            ) from error
    return PairPlan(directory)


def _write(directory: Path, store: PairStore, limits: Limits, packing: str) -> None:
    kept = keep(store, limits)
    if not len(kept.pairs_K):
        raise InputError(_nothing_left(store, limits, kept.counts))
    lengths = _row_lengths(store, kept)
    rows = _rows(lengths, limits, packing)
    pieces_K = _pieces(store, kept)
    number = pairs = 0
    with (directory / "rows.bin").open("wb") as firsts, (directory / "pieces.bin").open("wb") as pieces:
        for row in rows:
            firsts.write(np.int64(pairs).tobytes())
            pieces.write(pieces_K[row].tobytes())
            number, pairs = number + 1, pairs + len(row)
        firsts.write(np.int64(pairs).tobytes())
    assert pairs == len(pieces_K), "a pair is in no row, or in two"
    source_tokens, target_tokens = (int(one.sum()) for one in lengths)
    described = {
        "rows": number,
        "pairs": pairs,
        "source_tokens": source_tokens,
        "target_tokens": target_tokens,
        "limits": [limits.source, limits.target],
        "counts": kept.counts._asdict(),
    }
    (directory / "plan.json").write_text(json.dumps(described), encoding="utf-8")


def _rows(lengths: tuple[np.ndarray, np.ndarray], limits: Limits, packing: str) -> Iterator[np.ndarray]:
    if packing == "padded":
        return (np.array([pair]) for pair in range(len(lengths[0])))
    return pair_bins.best_fit(*lengths, source=limits.source, target=limits.target)


def _row_lengths(store: PairStore, kept: Kept) -> tuple[np.ndarray, np.ndarray]:
    """Positions that each pair takes on either side, EOS included."""
    source_end, target_end = (int(side.eos is not None) for side in store)
    return kept.sources_K + source_end, kept.targets_K + target_end * kept.whole_K


def _pieces(store: PairStore, kept: Kept) -> np.ndarray:
    pieces_K = np.empty(len(kept.pairs_K), PIECE)
    for name, side, lengths_K in (("source", store.sources, kept.sources_K), ("target", store.targets, kept.targets_K)):
        pieces_K[f"{name}_start"] = side.offsets[:][kept.pairs_K] + (side.bos is not None)
        pieces_K[name] = lengths_K
    pieces_K["whole"] = kept.whole_K
    return pieces_K


def _nothing_left(store: PairStore, limits: Limits, counts: Counts) -> str:
    reasons = {
        "have a side without tokens": counts.empty,
        f"are more uneven than data.max_length_ratio {limits.ratio}": counts.uneven,
        f"are longer than data.source_context {limits.source} or data.context {limits.target}": counts.long,
    }
    why = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)
    return f"no pair of {store.source} is left to train on: {why}. Raise these limits, or use other pairs"
