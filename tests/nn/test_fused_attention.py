"""What cuDNN is asked for. It runs on NVIDIA GPUs alone: here XLA's form of the same JAX function answers."""

from __future__ import annotations

import jax
import pytest

from lm.nn.attention import AttentionMask
from lm.nn.fused_attention import attend_cudnn

from .attention_cases import arrays, assert_equals_reference, packed


@pytest.fixture
def asked(monkeypatch):
    """The calls of `jax.nn.dot_product_attention`, answered by XLA."""
    calls, by_jax = [], jax.nn.dot_product_attention

    def by_xla(*arrays, **options):
        calls.append(options)
        return by_jax(*arrays, **{**options, "implementation": "xla"})

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    return calls


@pytest.mark.parametrize(
    "mask",
    [AttentionMask(True), AttentionMask(False), AttentionMask(True, window=5), packed(2, 14, causal=True, window=5)],
    ids=["causal", "all", "window", "packed with a window"],
)
def test_equals_the_reference(mask, asked):
    assert_equals_reference(attend_cudnn, *arrays(14, 4, 2), mask, dtype="bfloat16")  # XLA computes in float32 as given
    assert all(call["implementation"] == "cudnn" and call["is_causal"] == mask.causal for call in asked)
    assert all(call["mask"] is None or call["local_window_size"] is None for call in asked), (
        "cuDNN refuses both at once"
    )
