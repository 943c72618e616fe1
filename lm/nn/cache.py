"""The key/value cache of incremental decoding.

Shapes: L layers, B batch, S slots, T new tokens, K key/value heads, H head width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


class KeyValueCache(NamedTuple):
    """Keys and values of the tokens seen so far, in slots [0, length) of every row.

    Rows are aligned at their ends: prompts of unequal length are padded on the left, with segment 0. Empty slots have
    segment 0 too, and causality hides them.
    """

    keys_LBSKH: Array
    values_LBSKH: Array
    segments_BS: Array
    length: Array

    @classmethod
    def empty(cls, layers: int, batch: int, slots: int, kv_heads: int, head_width: int, dtype: str) -> KeyValueCache:
        """A cache with room for `slots` tokens a row."""
        zeros = jnp.zeros((layers, batch, slots, kv_heads, head_width), dtype)
        return cls(zeros, zeros, jnp.zeros((batch, slots), jnp.int32), jnp.zeros((), jnp.int32))

    def write(self, layer: Array | int, k_BTKH: Array, v_BTKH: Array) -> KeyValueCache:
        """Puts one layer's keys and values into slots [length, length + T); `advance` moves the length, once a step."""

        def put(cached: Array, new: Array) -> Array:
            return lax.dynamic_update_slice(cached, new[None].astype(cached.dtype), (layer, 0, self.length, 0, 0))

        return self._replace(keys_LBSKH=put(self.keys_LBSKH, k_BTKH), values_LBSKH=put(self.values_LBSKH, v_BTKH))

    def read(self, layer: Array | int, dtype: jnp.dtype) -> tuple[Array, Array]:
        """All keys and values of one layer, each [B, S, K, H]."""
        keys, values = (
            lax.dynamic_index_in_dim(cached, layer, axis=0, keepdims=False)
            for cached in (self.keys_LBSKH, self.values_LBSKH)
        )
        return keys.astype(dtype), values.astype(dtype)

    def mark(self, segments_BT: Array) -> KeyValueCache:
        """Records the segments of the tokens about to be written."""
        return self._replace(segments_BS=lax.dynamic_update_slice(self.segments_BS, segments_BT, (0, self.length)))

    def advance(self, tokens: int) -> KeyValueCache:
        """Counts the tokens just written."""
        return self._replace(length=self.length + tokens)
