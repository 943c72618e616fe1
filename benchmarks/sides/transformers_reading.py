"""transformers scoring a text, or continuing prompts. SPEC: as benchmarks/reading.py writes it.

Scoring is the loop of its documentation ("Perplexity of fixed-length models"): one window at a time through the model
with labels, those of the context -100, whose mean loss is multiplied by the targets; without its first flaw, that its
windows' ends score fewer targets than they count.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.serving import Side, serve
from benchmarks.sides.torch_steps import DEVICE
from lm.evaluation.windows import windows


def build(spec: dict[str, Any]) -> Side:
    dtype = getattr(torch, spec["dtype"])
    model = transformers.AutoModelForCausalLM.from_pretrained(spec["folder"], dtype=dtype).eval().to(DEVICE)
    ids = torch.from_numpy(np.load(spec["ids"]).astype(np.int64)).to(DEVICE)
    side = {"generation": generation, "evaluation": evaluation}[spec["task"]](model, ids, spec)
    return side._replace(device_bytes=torch.cuda.max_memory_allocated) if DEVICE == "cuda" else side


def generation(model: Any, ids_BP: torch.Tensor, spec: dict[str, Any]) -> Side:
    """Greedy, without an end."""
    number = {"max_new_tokens": spec["new_tokens"], "min_new_tokens": spec["new_tokens"]}

    def new_ids() -> torch.Tensor:
        with torch.inference_mode():
            mask = torch.ones_like(ids_BP)
            whole = model.generate(ids_BP, attention_mask=mask, do_sample=False, pad_token_id=0, **number)
        return whole[:, ids_BP.shape[1] :]

    def steps(times: int) -> None:
        for _ in range(times):
            new_ids().cpu()

    return Side(steps, {"parameters": model.num_parameters(), "result": new_ids()[0].tolist()})


def evaluation(model: Any, ids_T: torch.Tensor, spec: dict[str, Any]) -> Side:
    def nats_per_token() -> float:
        nats, tokens = 0.0, 0
        for each in windows(len(ids_T), window=spec["window"], stride=spec["stride"]):
            inputs = ids_T[None, each.begin : each.end + 1]
            labels = inputs.clone()
            labels[:, : -each.scored] = -100
            with torch.no_grad():
                nats += model(inputs, labels=labels).loss.item() * each.scored
            tokens += each.scored
        return nats / tokens

    def steps(number: int) -> None:
        for _ in range(number):
            nats_per_token()

    return Side(steps, {"parameters": model.num_parameters(), "result": nats_per_token()})


if __name__ == "__main__":
    serve(build)
