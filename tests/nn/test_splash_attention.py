"""The TPU's kernel, run by Pallas' interpreter, against the reference."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import pytest

from lm.nn.attention import AttentionMask
from lm.nn.splash_attention import attend_splash

from .attention_cases import arrays, assert_equals_reference, packed

interpreted = functools.partial(attend_splash, interpret=True)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_equals_the_reference_packed_with_window_and_cap(kv_heads):
    """130 is no multiple of the 128 lanes: the row is padded."""
    q, k, v = arrays(130, 2, kv_heads)
    assert_equals_reference(interpreted, q, k, v, packed(2, 130, causal=True, window=20), softcap=2.0)


def test_equals_the_reference_between_rows_of_other_lengths():
    q, k, v = arrays(40, 2, 2, B=1, S=200)
    mask = AttentionMask(False, jnp.repeat(jnp.array([[1, 2]]), 20, 1), jnp.repeat(jnp.array([[1, 2]]), 100, 1))
    assert_equals_reference(interpreted, q, k, v, mask)


@pytest.mark.parametrize(("T", "mask"), [(128, AttentionMask(True)), (130, AttentionMask(False, window=20))])
def test_equals_the_reference_in_other_forms(T, mask):
    """Where nothing is causal, only its segment hides the padding."""
    assert_equals_reference(interpreted, *arrays(T, 2, 2, B=1), mask)
