"""How fast a text is scored beside the loop over transformers that people copy, on the same windows.

    python -m benchmarks.evaluation [--stories DIR] [--gpt2] [--windows N] [--repeats N] [--json FILE]

Their side is the loop of the transformers documentation ("Perplexity of fixed-length models"): one window at a time
through the model with labels, those of the context -100, whose mean loss is multiplied by the targets; without its
first flaw, that its windows' ends score fewer targets than they count. Ours is `lm.evaluation.perplexity.Evaluator`.
Both run in one process, in turns, each after a turn that isn't counted (in which ours compiles).

--stories is the folder of a Llama-type model in float32 with a stories.txt; --gpt2 is a GPT-2 of 124 million random
parameters, on random ids. It needs torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers

import lm
from lm.config import ParallelConfig
from lm.data.tokens import Sizes
from lm.evaluation.perplexity import Evaluator
from lm.evaluation.windows import windows
from lm.parallel import make_mesh


class Ids:
    """A store of one document of ids, and the tokenizer that made them: neither text nor words."""

    source, corpus_sha256, sha256, kind = "ids", "", "", "ids"
    prompts = bos = eos = None

    def __init__(self, ids: np.ndarray, first_id: int):
        self._ids, self.first_id = ids, first_id

    def __len__(self) -> int:
        return 1

    def document(self, index: int) -> np.ndarray:
        return self._ids

    def document_id(self, index: int) -> str:
        return "ids"

    def sizes(self, index: int) -> Sizes:
        return Sizes(len(self._ids), len(self._ids))


def theirs(model: Any, ids: np.ndarray, window: int, stride: int) -> tuple[float, float]:
    """(nats a token, seconds)."""
    row = torch.tensor(ids[None].astype(np.int64))
    start, nats, tokens = time.perf_counter(), 0.0, 0
    for each in windows(len(ids), window=window, stride=stride):
        inputs = row[:, each.begin : each.end + 1]
        labels = inputs.clone()
        labels[:, : -each.scored] = -100
        with torch.no_grad():
            nats += model(inputs, labels=labels).loss.item() * each.scored
        tokens += each.scored
    return nats / tokens, time.perf_counter() - start


def ours(run: lm.Loaded, ids: np.ndarray, window: int, stride: int, batch_size: int) -> Any:
    """A function that gives (nats a token, seconds)."""
    mesh = make_mesh(ParallelConfig(), jax.devices()[:1])
    store: Any = Ids(ids[1:], int(ids[0]))
    evaluator = Evaluator(
        run.config.model, store, store, window=window, stride=stride, batch_size=batch_size, mesh=mesh
    )

    def measure() -> tuple[float, float]:
        scores = evaluator(run.params)
        return scores.nats_per_token, scores.seconds

    return measure


def compare(
    folder: Path,
    ids: np.ndarray,
    *,
    window: int,
    stride: int,
    dtypes: list[tuple[str, str]],
    batch_size: int,
    repeats: int,
) -> dict[str, Any]:
    """Seconds and mean nats of both, for each pair of our dtype and theirs."""
    found: dict[str, Any] = {"tokens": len(ids) - 1, "window": window, "stride": stride, "batch_size": batch_size}
    for our_dtype, their_dtype in dtypes:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, their_dtype)).eval()
        measure = ours(lm.load(folder, dtype=our_dtype), ids, window, stride, batch_size)
        begin = time.perf_counter()
        measure()
        first = time.perf_counter() - begin
        theirs(model, ids[: 2 * window], window, stride)
        rates, pairs = [], []
        for _ in range(repeats):
            our_nats, our_seconds = measure()
            their_nats, their_seconds = theirs(model, ids, window, stride)
            rates.append((our_seconds, their_seconds))
            pairs.append(their_seconds / our_seconds)
        our_seconds, their_seconds = (statistics.median(column) for column in zip(*rates, strict=True))
        found[f"{our_dtype}, theirs {their_dtype}"] = {
            "rate beside theirs, median of pairs": statistics.median(pairs),
            "seconds of ours": our_seconds,
            "seconds of theirs": their_seconds,
            "seconds of ours with compilation": first,
            "tokens per second of ours": (len(ids) - 1) / our_seconds,
            "nats per token of ours": our_nats,
            "difference in nats per token": our_nats - their_nats,
        }
    return found


def stories(folder: Path, repeats: int) -> dict[str, Any]:
    """A small trained model on its own kind of text."""
    tokenizer = lm.load(folder).tokenizer
    assert tokenizer is not None and tokenizer.first_id is not None
    text = (folder / "stories.txt").read_text(encoding="utf-8")
    ids = np.concatenate([[tokenizer.first_id], tokenizer.encode(text)]).astype(np.int32)
    how = {"dtypes": [("float32", "float32")], "batch_size": 16, "repeats": repeats}
    return {f"stride {s}": compare(folder, ids, window=511, stride=s, **how) for s in (511, 128)}


def gpt2(number: int, repeats: int) -> dict[str, Any]:
    """GPT-2's shape, drawn at random, on `number` windows of random ids."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        transformers.GPT2LMHeadModel(transformers.GPT2Config()).save_pretrained(name)
        ids = np.random.default_rng(0).integers(0, 50257, 1024 + 512 * (number - 1)).astype(np.int32)
        ids[0] = 50256
        dtypes = [("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float32", "float32")]
        return compare(Path(name), ids, window=1023, stride=512, dtypes=dtypes, batch_size=4, repeats=repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=Path, help="folder of a model with a stories.txt")
    parser.add_argument("--gpt2", action="store_true", help="124 million random parameters")
    parser.add_argument("--windows", type=int, default=8, help="of 1023 inputs, 512 of them new, for --gpt2")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    given = parser.parse_args()
    found: dict[str, Any] = {"cores": os.cpu_count(), "device": str(jax.devices()[0])}
    if given.stories:
        found["stories"] = stories(given.stories, given.repeats)
    if given.gpt2:
        found["gpt2"] = gpt2(given.windows, given.repeats)
    text = json.dumps(found, indent=2)
    print(text)
    if given.json:
        given.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
