"""Our evaluation gives the nats that a plain loop over a transformers model gives."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from lm.data.corpus import open_corpus  # noqa: E402
from lm.data.tokenizer import ByteTokenizer  # noqa: E402
from lm.data.tokens import tokenize  # noqa: E402
from lm.evaluation.perplexity import Evaluator  # noqa: E402

from .peers import GPT2, LLAMA, resolved, their_logits, weights  # noqa: E402

pytestmark = pytest.mark.parity

WINDOW = 16
# With a BOS: far less than a window, just one, one more, one less, several; and bytes that aren't ASCII.
TEXTS = ["a", "fifteen bytes..", "of sixteen bytes", "fourteen bytes", "Grüße aus Köln. " * 5, "The last one. " * 8]

# Relative: float32 logits, summed in another order; the totals are float64 on both sides.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return tokenize(open_corpus(f"text:{folder}/*.txt"), ByteTokenizer())


def their_nats(model, *, window: int, stride: int, bos: bool = True) -> float:
    """By the protocol, window after window, without batches, packing or padding."""
    nats = 0.0
    for text in TEXTS:
        ids = np.array([256] * bos + list(text.encode()), np.int64)
        last_scored = 0
        while last_scored < len(ids) - 1:
            last = min(last_scored + (stride if last_scored else window), len(ids) - 1)
            begin = max(last - window, 0)
            with torch.no_grad():
                logits_TV = their_logits(model, ids[None, begin:last])[0].double()
            targets_T = torch.tensor(ids[begin + 1 : last + 1])
            nll_T = torch.nn.functional.cross_entropy(logits_TV, targets_T, reduction="none")
            nats += nll_T[last_scored - last :].sum().item()
            last_scored = last
    return nats


@pytest.mark.parametrize("family", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_nats_equal(family, store, one_device):
    cfg = resolved(dataclasses.replace(family.config, num_layers=1), ByteTokenizer.vocab_size, WINDOW + 1)
    model = family.model(cfg, gain=4.0)
    params = family.params(weights(model), cfg)
    for stride in (16, 5, 1):
        evaluator = Evaluator(cfg, store, ByteTokenizer(), window=WINDOW, stride=stride, batch_size=4, mesh=one_device)
        scores = evaluator(params)
        expected = their_nats(model, window=WINDOW, stride=stride)
        assert scores.tokens == sum(len(text.encode()) for text in TEXTS)
        assert scores.nats == pytest.approx(expected, rel=TOLERANCE)
        assert scores.perplexity == pytest.approx(math.exp(expected / scores.tokens), rel=TOLERANCE)
        assert scores.bits_per_byte == pytest.approx(expected / scores.bytes / math.log(2), rel=TOLERANCE)
        for other in ({"stride": stride % 16 + 1}, {"bos": False}, {"window": 17}):
            wrong = their_nats(model, **({"window": WINDOW, "stride": stride} | other))
            assert scores.nats != pytest.approx(wrong, rel=100 * TOLERANCE), other
