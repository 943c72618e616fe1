"""How fast batches are made, how soon a far step is there, and how long rows take to plan.

    python -m benchmarks.data [--tokens N] [--threads N] [--json FILE]

The store is sparse: its ids are holes in a file, which are read like any other bytes, and its offsets real.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from lm.data.column import Column, SortedColumn, write_index
from lm.data.pipeline import Pipeline
from lm.data.rows import make_rows

DOCUMENT = 1000
"""Tokens in each document of the sparse store."""
FAR_STEP = 10_000_000


class SparseStore:
    """A token store of zeros, of which only the offsets take room on the disk."""

    prompts: Column | None = None

    def __init__(self, folder: Path, tokens: int, sizes: np.ndarray | None = None):
        self.num_tokens, self.source, self.fingerprint = tokens, "sparse", f"sparse {folder}"
        self.files = [folder / "ids.bin", folder / "offsets.bin"]
        with self.files[0].open("wb") as file:
            file.truncate(2 * tokens)
        ends = np.arange(DOCUMENT, tokens + 1, DOCUMENT) if sizes is None else np.cumsum(sizes)
        offsets = np.concatenate([[0], ends])
        offsets.tofile(self.files[1])
        write_index(self.files[1], len(offsets))
        self._ids, self.offsets = Column(self.files[0], np.uint16, tokens), SortedColumn(self.files[1], len(offsets))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._ids[start:stop]

    def drop_cache(self) -> None:
        """Makes the kernel forget the files."""
        for path in self.files:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def pipeline_of(store: SparseStore, context: int, batch_size: int, packing: str = "split") -> Pipeline:
    rows = make_rows(store, context=context, packing=packing, prompt_loss=False)
    return Pipeline([(1.0, rows)], batch_size=batch_size, seed=0)


def rate(pipeline: Pipeline, threads: int, seconds: float) -> float:
    """Tokens a second through `iterate`; without threads, of `batch_at`."""
    batches = pipeline.iterate(threads=threads) if threads else map(pipeline.batch_at, range(10**9))
    for _ in range(10):
        next(batches)
    begin, steps = time.perf_counter(), 0
    while (spent := time.perf_counter() - begin) < seconds:
        next(batches)
        steps += 1
    if threads:
        batches.close()  # type: ignore[attr-defined]
    return steps * pipeline.tokens_per_step / spent


def far_step(store: SparseStore, context: int, batch_size: int) -> float:
    """Milliseconds that the first batch of a new pipeline takes, far into training and with no page in memory."""
    pipeline = pipeline_of(store, context, batch_size)
    store.drop_cache()
    begin = time.perf_counter()
    pipeline.batch_at(FAR_STEP)
    return 1e3 * (time.perf_counter() - begin)


def planned(folder: Path, documents: int, context: int) -> tuple[float, SparseStore]:
    """Seconds that a best-fit plan of documents of about 800 tokens takes."""
    sizes = np.random.default_rng(0).lognormal(6, 1.2, documents).astype(np.int64) + 1
    folder.mkdir()
    store = SparseStore(folder, int(sizes.sum()), sizes)
    begin = time.perf_counter()
    make_rows(store, context=context, packing="best_fit", prompt_loss=False)
    return time.perf_counter() - begin, store


def resident() -> float:
    """Memory of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1e3


def measure(tokens: int, documents: int, threads: int, seconds: float, repeats: int) -> dict[str, float]:
    """All figures, the best of some repeats each."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["LM_CACHE"] = name  # plans of a store that is thrown away
        store = SparseStore(folder, tokens)
        found[f"step {FAR_STEP:,}, 64 x 1024, no page in memory, ms"] = min(
            far_step(store, 1024, 64) for _ in range(repeats)
        )
        pipelines = [pipeline_of(store, 64, 12), pipeline_of(store, 1024, 64)]
        spent, other = planned(folder / "planned", documents, 1024)
        found[f"best-fit plan of {documents:,} documents, s"] = spent
        pipelines.append(pipeline_of(other, 1024, 64, "best_fit"))
        found["its fill"] = pipelines[-1].fill(1)
        rate(pipelines[-1], threads, seconds)
        before = resident()
        for packing, pipeline in zip(("split", "split", "best fit"), pipelines, strict=True):
            for number in (0, threads):
                name = f"{pipeline.batch_size} x {pipeline.context}, {packing}, "
                name += f"iterate with {number} threads" if number else "batch_at"
                found[f"{name}, million tokens/s"] = max(rate(pipeline, number, seconds) for _ in range(repeats)) / 1e6
        found["memory while reading, MB more"] = resident() - before
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10_000_000_000, help="tokens in the sparse store")
    parser.add_argument("--documents", type=int, default=10_000_000, help="documents to plan rows of")
    parser.add_argument("--threads", type=int, default=2, help="threads of iterate")
    parser.add_argument("--seconds", type=float, default=2, help="how long each rate is measured")
    parser.add_argument("--repeats", type=int, default=3, help="the best of how many counts")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    given = parser.parse_args()
    found = measure(given.tokens, given.documents, given.threads, given.seconds, given.repeats)
    for name, value in found.items():
        print(f"{name:60}{value:12.3f}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
