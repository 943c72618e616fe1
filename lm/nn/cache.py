"""The key/value cache of incremental decoding.

Shapes: B batch, S slots, P slots of a part, W of a ring, T new tokens, K key/value heads, H head width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lm.nn.attention import AttentionMask

Array = jax.Array
Parts = tuple[Array, ...]


class KeyValueCache(NamedTuple):
    """Keys and values of the tokens seen so far: that of index i in its row in slot i of every row.

    Rows are aligned at their ends: prompts of unequal length are padded on the left, with segment 0. Empty slots have
    segment 0 too, and causality hides them. A layer with a sliding window may keep a ring: as many slots as its window,
    token i in slot i modulo that, over the token that has just left the window.

    keys, values: of each layer, its parts, [B, K, P, H], one after another, or a ring [B, K, W, H]: as the products of
      attention read them. Of several parts those are read that hold something, see `lm.nn.filled_attention`.
    segments_BS: of all tokens. rings: those in the slots of rings, [B, W], by their size.
    length: tokens in a row. The Python number 0 where it is known that there are none: tokens then see one another
      alone, by any back end.
    """

    keys: tuple[Parts, ...]
    values: tuple[Parts, ...]
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
        part: int | None = None,
    ) -> KeyValueCache:
        """A cache with room for `slots` tokens a row.

        Args:
          windows: those of the layers, repeated over them, that are to keep rings; None: no ring. Into rings, all
            tokens after the first call go one at a time; into parts too.
          part: slots of a part; None: one part of all.
        """
        sizes = [slots if (window := windows[i % len(windows)]) is None else min(window, slots) for i in range(layers)]

        def zeros(size: int) -> Parts:
            most = part if part is not None and size == slots else size
            starts = range(0, size, most)
            return tuple(jnp.zeros((batch, kv_heads, min(most, size - at), head_width), dtype) for at in starts)

        keys, values = (tuple(map(zeros, sizes)) for _ in range(2))
        rings = {size: jnp.zeros((batch, size), jnp.int32) for size in sorted(set(sizes) - {slots})}
        return cls(keys, values, jnp.zeros((batch, slots), jnp.int32), rings, 0)

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
    ) -> tuple[KeyValueCache, Parts, Parts, AttentionMask]:
        """Writes the keys and values of T tokens at one layer: the cache, all keys and values that the tokens see,
        parts of [B, P, K, H] in the cache's dtype, and the mask for these.

        `mark` is called before, `advance` after all layers, once a step.
        """
        new = [x_BTKH.transpose(0, 2, 1, 3) for x_BTKH in (k_BTKH, v_BTKH)]
        keys, values = (self._written(held[layer], x) for held, x in zip((self.keys, self.values), new, strict=True))
        written = self._replace(keys=_with(self.keys, layer, keys), values=_with(self.values, layer, values))
        if self.known_empty:
            return written, (k_BTKH,), (v_BTKH,), mask
        if self._ring(keys):  # all in it is in the window, and before the query or the query's own
            mask = AttentionMask(False, mask.query_segments_BT, self.rings[keys[0].shape[2]])
        seen_keys, seen_values = (tuple(x.transpose(0, 2, 1, 3) for x in parts) for parts in (keys, values))
        return written, seen_keys, seen_values, mask

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

        def moved(x_BKPH: Array, start: int) -> Array:
            part = lax.slice_in_dim(x_BKPH, start, x_BKPH.shape[2], axis=2)
            return lax.dynamic_update_slice_in_dim(x_BKPH, jnp.take(part, rows_B, axis=0), start, axis=2)

        def all_moved(parts: Parts) -> Parts:
            if len(parts) == 1:
                return (
                    moved(parts[0], 0 if self._ring(parts) else begin),
                )  # a ring's slots are soon all of later ones
            found = []
            for x_BKPH, at in zip(parts, _starts(parts), strict=True):
                if (start := max(begin - at, 0)) < x_BKPH.shape[2]:
                    move = functools.partial(moved, start=start)
                    x_BKPH = lax.cond(self.length > at, move, lambda empty_BKPH: empty_BKPH, x_BKPH)
                found.append(x_BKPH)
            return tuple(found)

        return self._replace(keys=tuple(map(all_moved, self.keys)), values=tuple(map(all_moved, self.values)))

    def _ring(self, parts: Parts) -> bool:
        return len(parts) == 1 and parts[0].shape[2] in self.rings

    def _written(self, parts: Parts, new_BKTH: Array) -> Parts:
        """A layer's keys or values with the next tokens in their slots."""
        new_BKTH = new_BKTH.astype(parts[0].dtype)
        if len(parts) == 1:
            return (self._put(parts[0], new_BKTH, axis=2),)
        found, tokens = [], new_BKTH.shape[2]
        assert self.known_empty or tokens == 1, "parts take the tokens after their first one by one"
        for x_BKPH, at in zip(parts, _starts(parts), strict=True):
            slots = x_BKPH.shape[2]
            if not self.known_empty:  # in every part one slot is written, in all but one what it holds
                slot = jnp.clip(self.length - at, 0, slots - 1)
                held = lax.dynamic_slice_in_dim(x_BKPH, slot, 1, axis=2)
                own = jnp.where(self.length - at == slot, new_BKTH, held)
                x_BKPH = lax.dynamic_update_slice_in_dim(x_BKPH, own, slot, axis=2)
            elif at < tokens:
                own = lax.slice_in_dim(new_BKTH, at, min(at + slots, tokens), axis=2)
                x_BKPH = lax.dynamic_update_slice_in_dim(x_BKPH, own, 0, axis=2)
            found.append(x_BKPH)
        return tuple(found)

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


def _starts(parts: Parts) -> list[int]:
    """The slot that each part begins with: all but the last are of one size."""
    return [index * parts[0].shape[2] for index in range(len(parts))]


def _with(held: tuple[Parts, ...], layer: int, new: Parts) -> tuple[Parts, ...]:
    return (*held[:layer], new, *held[layer + 1 :])
