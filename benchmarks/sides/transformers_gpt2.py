"""GPT-2 of transformers, in torch, with fused AdamW as its Trainer takes it. SPEC: as torch_steps.side says."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from benchmarks.serving import Side, serve
from benchmarks.sides.torch_steps import DEVICE, side


def build(spec: dict[str, Any]) -> Side:
    torch.manual_seed(0)
    shape = spec["workload"]
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_positions=shape["context"],
            vocab_size=shape["vocabulary"],
            n_layer=shape["layers"],
            n_head=shape["heads"],
            n_embd=shape["width"],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.99), weight_decay=0.1, fused=True)
    # It shifts the labels itself: a row has one target fewer, with the same work.
    return side(spec, model, optimizer, lambda called, tokens, _: called(input_ids=tokens, labels=tokens).loss)


if __name__ == "__main__":
    serve(build)
