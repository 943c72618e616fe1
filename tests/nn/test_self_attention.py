"""How the heads are taken out of the fused projection."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lm.nn.self_attention import _heads

from .gradients import assert_gradients_equal

B, T, K, G, H = 2, 3, 2, 3, 4


def formula(qkv_BTKE):
    """Of each key/value head: its G queries one after another, its key, its value."""
    q = [qkv_BTKE[:, :, k, g * H : (g + 1) * H] for k in range(K) for g in range(G)]
    k, v = (qkv_BTKE[..., (G + i) * H : (G + i + 1) * H] for i in (0, 1))
    return jnp.stack(q, axis=2), k, v


def test_heads_and_their_gradients():
    qkv_BTKE = jax.random.normal(jax.random.key(0), (B, T, K, (G + 2) * H))
    for got, wanted in zip(_heads(qkv_BTKE, H), formula(qkv_BTKE), strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert_gradients_equal(lambda x: _heads(x, H), formula, qkv_BTKE)
