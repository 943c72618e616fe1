"""nanoGPT's own model and optimizer, from a checkout. SPEC: as torch_steps.side says, with {"checkout": DIR}."""

from __future__ import annotations

import sys
from typing import Any

import torch

from benchmarks.serving import Side, serve
from benchmarks.sides.torch_steps import DEVICE, side


def build(spec: dict[str, Any]) -> Side:
    sys.path.insert(0, spec["checkout"])
    from model import GPT, GPTConfig

    torch.manual_seed(0)
    shape = spec["workload"]
    model = GPT(
        GPTConfig(
            block_size=shape["context"],
            vocab_size=shape["vocabulary"],
            n_layer=shape["layers"],
            n_head=shape["heads"],
            n_embd=shape["width"],
            dropout=0.0,
            bias=False,
        )
    ).to(DEVICE)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), DEVICE)
    return side(spec, model, optimizer, lambda called, tokens, targets: called(tokens, targets)[1])


if __name__ == "__main__":
    serve(build)
