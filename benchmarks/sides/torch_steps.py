"""What the sides in torch have in common: device, precision, compilation, and the step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.serving import Side
from benchmarks.workloads import random_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def side(
    spec: dict[str, Any], model: Any, optimizer: Any, loss_of: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
) -> Side:
    """SPEC: {"workload": {...}, "dtype": "float32" or "bfloat16" (autocast), "compile": whether torch.compile is on}.

    Args:
      loss_of: of the model, compiled or not, tokens and targets, both [B, T].
    """
    if DEVICE == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as nanoGPT's train.py does
    batches = [tuple(map(torch.from_numpy, pair)) for pair in random_rows(spec["workload"])]
    called = torch.compile(model) if spec["compile"] else model
    precision: Any = contextlib.nullcontext()
    if spec["dtype"] == "bfloat16":
        precision = torch.autocast(DEVICE, dtype=torch.bfloat16)

    def run(steps: int) -> None:
        for step in range(steps):
            tokens, targets = batches[step % len(batches)]
            if DEVICE == "cuda":
                tokens, targets = (x.pin_memory().to(DEVICE, non_blocking=True) for x in (tokens, targets))
            with precision:
                loss = loss_of(called, tokens, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss.item()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    facts = {"parameters": sum(parameter.numel() for parameter in model.parameters())}  # a tied head counts once
    return Side(run, facts, torch.cuda.max_memory_allocated if DEVICE == "cuda" else lambda: None)
