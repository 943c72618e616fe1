"""The key/value cache of incremental decoding.

Shapes: B batch, S slots, W slots of a ring, T new tokens, K key/value heads, H head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lm.nn.attention import AttentionMask

Array = jax.Array


class KeyValueCache(NamedTuple):
    """Keys and values of the tokens seen so far: that of index i in its row in slot i of every row.

    Rows are aligned at their ends: prompts of unequal length are padded on the left, with segment 0. Empty slots have
    segment 0 too, and causality hides them. A layer with a sliding window may keep a ring: as many slots as its window,
    token i in slot i modulo that, over the token that has just left the window.

    keys, values: of each layer, [B, K, S, H] or in a ring [B, K, W, H]: as the products of attention read them.
    segments_BS: of all tokens. rings: those in the slots of rings, [B, W], by their size.
    length: tokens in a row. The Python number 0 where it is known that there are none: tokens then see one another
      alone, by any back end.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    segments_BS: Array
    rings: dict[int, Array]
    length: Array | int

    @classmethod
    def empty(
        cls,
        layers: int,
        batch: int,
        slots: int,
        kv_heads: int,
        head_width: int,
        dtype: str,
        windows: Sequence[int | None] = (None,),
    ) -> KeyValueCache:
        """A cache with room for `slots` tokens a row.

        Args:
          windows: those of the layers, repeated over them, that are to keep rings; None: no ring. Into rings, all
            tokens after the first call go one at a time.
        """
        sizes = [slots if (window := windows[i % len(windows)]) is None else min(window, slots) for i in range(layers)]
        zeros = tuple(jnp.zeros((batch, kv_heads, size, head_width), dtype) for size in sizes)
        rings = {size: jnp.zeros((batch, size), jnp.int32) for size in sorted(set(sizes) - {slots})}
        return cls(zeros, tuple(map(jnp.zeros_like, zeros)), jnp.zeros((batch, slots), jnp.int32), rings, 0)

    @property
    def known_empty(self) -> bool:
        return isinstance(self.length, int) and self.length == 0

    def mark(self, segments_BT: Array) -> KeyValueCache:
        """Records the segments of the tokens about to be written."""
        tokens = segments_BT.shape[1]
        assert self.known_empty or tokens == 1 or not self.rings, "a ring takes the tokens after its first one by one"
        rings = {size: self._put(ring, segments_BT, axis=1) for size, ring in self.rings.items()}
        return self._replace(segments_BS=self._put(self.segments_BS, segments_BT, axis=1), rings=rings)

    def see(
        self, layer: int, k_BTKH: Array, v_BTKH: Array, mask: AttentionMask
    ) -> tuple[KeyValueCache, Array, Array, AttentionMask]:
        """Writes the keys and values of T tokens at one layer: the cache, all keys and values that the tokens see,
        each [B, S, K, H] in the cache's dtype, and the mask for these.

        `mark` is called before, `advance` after all layers, once a step.
        """
        new = [x_BTKH.transpose(0, 2, 1, 3) for x_BTKH in (k_BTKH, v_BTKH)]
        k, v = (
            self._put(held[layer], x_BKTH.astype(held[layer].dtype), axis=2)
            for held, x_BKTH in zip((self.keys, self.values), new, strict=True)
        )
        written = self._replace(keys=_with(self.keys, layer, k), values=_with(self.values, layer, v))
        if self.known_empty:
            return written, k_BTKH, v_BTKH, mask
        if (slots := k.shape[2]) in self.rings:  # all in it is in the window, and before the query or the query's own
            mask = AttentionMask(False, mask.query_segments_BT, self.rings[slots])
        return written, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), mask

    def advance(self, tokens: int) -> KeyValueCache:
        """Counts the tokens just written."""
        return self._replace(length=self.length + tokens)

    def repeat(self, times: int) -> KeyValueCache:
        """Every row `times` times, one after another."""
        held = (self.keys, self.values, self.segments_BS, self.rings)
        keys, values, segments_BS, rings = jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), held)
        return KeyValueCache(keys, values, segments_BS, rings, self.length)

    def reorder(self, rows_B: Array, begin: int) -> KeyValueCache:
        """Row b becomes what row rows_B[b] is; both have the same tokens before index `begin`, which stay in place."""

        def moved(x_BKSH: Array) -> Array:
            slots = x_BKSH.shape[2]
            start = 0 if slots in self.rings else begin  # a ring's slots are soon all of later tokens
            part = lax.slice_in_dim(x_BKSH, start, slots, axis=2)
            return lax.dynamic_update_slice_in_dim(x_BKSH, jnp.take(part, rows_B, axis=0), start, axis=2)

        return self._replace(keys=tuple(map(moved, self.keys)), values=tuple(map(moved, self.values)))

    def _put(self, held: Array, new: Array, axis: int) -> Array:
        """The next tokens in their slots, of an array whose `axis` is slots."""
        slots, tokens = held.shape[axis], new.shape[axis]
        if self.known_empty:
            if tokens <= slots:
                return lax.dynamic_update_slice_in_dim(held, new, 0, axis)
            last = lax.slice_in_dim(new, tokens - slots, tokens, axis=axis)
            return jnp.roll(last, tokens % slots, axis)
        start = self.length % slots if slots in self.rings else self.length
        return lax.dynamic_update_slice_in_dim(held, new, start, axis)


def _with(held: tuple[Array, ...], layer: int, new: Array) -> tuple[Array, ...]:
    return (*held[:layer], new, *held[layer + 1 :])
