"""This project scoring a text, or continuing prompts. SPEC: as benchmarks/reading.py writes it."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

import lm
from benchmarks.serving import Side
from lm.config import ParallelConfig
from lm.data.tokens import Sizes
from lm.decoding import ready_params, with_head
from lm.evaluation.perplexity import Evaluator
from lm.parallel import make_mesh
from lm.sampling import Sampling
from lm.token_generation import generate_ids


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


def build(spec: dict[str, Any]) -> Side:
    run = lm.load(spec["folder"], dtype=spec["dtype"])
    ids = np.load(spec["ids"])
    side = {"generation": generation, "evaluation": evaluation}[spec["task"]](run, ids, spec)
    device = jax.devices()[0]
    return side._replace(device_bytes=lambda: (device.memory_stats() or {}).get("peak_bytes_in_use"))


def generation(run: lm.Loaded, ids_BP: np.ndarray, spec: dict[str, Any]) -> Side:
    """Greedy, without an end."""

    def new_ids() -> list[np.ndarray]:
        how = {"max_tokens": spec["new_tokens"], "sampling": Sampling(0.0), "seed": 0, "end_id": None}
        return generate_ids(run.params, run.config.model, list(ids_BP), **how)

    def steps(number: int) -> None:
        for _ in range(number):
            new_ids()

    facts = {"parameters": run.num_parameters, "result": new_ids()[0].tolist()}
    return Side(steps, facts | {"weight_bytes": weight_bytes(run)})


def weight_bytes(run: lm.Loaded) -> int:
    """Of the weights that are read whole for each token: all but tables of which a token takes its own row."""
    ready = with_head(ready_params(run.params, run.config.model), run.config.model, greedy=True)
    tables = {"tokens", "positions"} if "kernel" in ready.get("head", {}) else {"positions"}
    read = {**ready, "embed": {name: table for name, table in ready["embed"].items() if name not in tables}}
    return sum(leaf.nbytes for leaf in jax.tree.leaves(read))


def evaluation(run: lm.Loaded, ids_T: np.ndarray, spec: dict[str, Any]) -> Side:
    """Windows in batches, as `lm.evaluate` has them."""
    mesh = make_mesh(ParallelConfig(), jax.devices()[:1])
    store: Any = Ids(ids_T[1:], int(ids_T[0]))
    sizes = {name: spec[name] for name in ("window", "stride", "batch_size")}
    evaluator = Evaluator(run.config.model, store, store, **sizes, mesh=mesh)

    def steps(number: int) -> None:
        for _ in range(number):
            evaluator(run.params)

    return Side(steps, {"parameters": run.num_parameters, "result": evaluator(run.params).nats_per_token})
