"""A token store held in memory, with the members that packing needs; and the same on disk."""

from __future__ import annotations

import hashlib

import numpy as np

from lm.data.column import Column, SortedColumn, write_index


class MemoryOffsets:
    """What `SortedColumn` does, of an array."""

    def __init__(self, values):
        self.values = np.asarray(values, np.int64)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return self.values[index]

    def before(self, value):
        return int(np.searchsorted(self.values, value, side="left"))

    def between(self, low, high):
        first, last = self.before(low), self.before(high + 1)
        return first, self.values[first:last]


class MemoryStore:
    """Ids and offsets of documents, with the size of each one's prompt if there are any."""

    def __init__(self, ids, offsets, prompts=None, source="memory"):
        self.ids, self.offsets, self.source = np.asarray(ids), MemoryOffsets(offsets), source
        self.prompts = None if prompts is None else np.asarray(prompts, np.int32)
        arrays = (self.ids, self.offsets.values, () if prompts is None else self.prompts)
        self.fingerprint = hashlib.sha256(b"".join(np.asarray(array).tobytes() for array in arrays)).hexdigest()

    @property
    def num_tokens(self):
        return int(self.offsets[-1])

    def __len__(self):
        return len(self.offsets) - 1

    def read(self, start, stop):
        assert 0 <= start <= stop <= self.num_tokens
        return self.ids[start:stop]

    def on_disk(self, folder):
        """The same, read by columns in a folder."""
        self.ids.tofile(folder / "ids.bin")
        store = MemoryStore(self.ids, self.offsets.values, self.prompts, self.source)
        self.offsets.values.tofile(folder / "offsets.bin")
        write_index(folder / "offsets.bin", len(self.offsets.values))
        store.offsets = SortedColumn(folder / "offsets.bin", len(self.offsets))
        column = Column(folder / "ids.bin", self.ids.dtype, len(self.ids))
        store.read = lambda start, stop: column[start:stop]
        if self.prompts is not None:
            self.prompts.tofile(folder / "prompts.bin")
            store.prompts = Column(folder / "prompts.bin", np.int32, len(self.prompts))
        return store


def store_of(sizes, *, prompts=None, vocabulary=None):
    """Documents of the given sizes. Every id is another one, from 100 up, unless there is a vocabulary to draw from."""
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    ids = np.arange(offsets[-1]) + 100
    if vocabulary is not None:
        ids = np.random.default_rng(len(sizes)).integers(vocabulary, size=offsets[-1])
    return MemoryStore(ids.astype(np.uint16), offsets, prompts)
