"""Greedy decoding with our cache gives, token for token, what transformers' `generate` gives."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from lm.generation import Sampling, generate_ids  # noqa: E402

from .peers import GPT2, LLAMA, resolved, some_ids, weights  # noqa: E402

pytestmark = pytest.mark.parity

NEW = 20
LENGTHS = (1, 4, 9, 13)


def their_ids(model, prompts, *, end_id: int | None = None, padding_seen: bool = False) -> list[list[int]]:
    """Prompts padded on the left, as transformers wants them."""
    longest = max(map(len, prompts))
    tokens, seen = np.zeros((2, len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt
        seen[row, longest - len(prompt) :] = 1
    seen = np.ones_like(seen) if padding_seen else seen
    found = model.generate(
        torch.tensor(tokens),
        attention_mask=torch.tensor(seen),
        do_sample=False,
        max_new_tokens=NEW,
        pad_token_id=0,
        eos_token_id=end_id,
    )
    rows = found[:, longest:].tolist()
    return [row[: row.index(end_id)] if end_id in row else row for row in rows]


@pytest.mark.parametrize("family", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_greedy_tokens_equal(family):
    cfg = resolved(family.config, vocabulary=101, positions=40)
    model = family.model(cfg, gain=4.0)
    params = family.params(weights(model), cfg)
    prompts = [some_ids(cfg, 1, length, seed=length)[0] for length in LENGTHS]

    def our_ids(end_id):
        found = generate_ids(
            params, cfg, prompts, max_tokens=NEW, sampling=Sampling(temperature=0.0), seed=0, end_id=end_id
        )
        return [row.tolist() for row in found]

    found = our_ids(None)
    assert found == their_ids(model, prompts)
    assert all(len(row) == NEW for row in found)
    assert min(len(set(row)) for row in found) > 3, found
    assert found != their_ids(model, prompts, padding_seen=True)

    end_id = found[0][7]
    ended = our_ids(end_id)
    assert ended == their_ids(model, prompts, end_id=end_id)
    assert len(ended[0]) <= 7
