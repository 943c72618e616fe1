"""Rows of pairs: each pair once, whole, under one number on both sides; and what the limits leave out or cut."""

from __future__ import annotations

import numpy as np
import pytest

from lm.config import InputError
from lm.data import pair_bins
from lm.data.pair_rows import PairRows
from lm.data.pairs import Counts, Limits, PairStore, sides, source_ids, target_ids, tokenize_pairs
from lm.data.pipeline import Pipeline
from lm.data.sources.document import Document
from lm.data.sources.token_files import TokenFiles
from lm.data.tokenizer import ByteTokenizer
from tests.data.memory_corpus import corpus_of

START = 7
TEXTS = [
    ("a", "one"),
    ("bc", "x"),
    ("a long source", "and a target"),
    ("def", "gh"),
    ("ž", "😀"),
    ("i", "jk"),
    ("l", "m"),
]


def store_of(pairs: list[tuple[str, str]]) -> PairStore:
    documents = (Document(f"{number}", target, source) for number, (source, target) in enumerate(pairs))
    tokenizer = ByteTokenizer()
    return tokenize_pairs(corpus_of(*documents), tokenizer, tokenizer)


@pytest.fixture(scope="module")
def store() -> PairStore:
    return store_of(TEXTS)


def rows_of(store: PairStore, *, source: int = 20, target: int = 16, packing: str = "best_fit", **limits) -> PairRows:
    found = Limits(source, target, limits.get("drop", False), limits.get("ratio"))
    return PairRows(store, found, start_id=START, packing=packing)


def pieces_of(rows: PairRows) -> list[tuple[list[int], list[int], list[int]]]:
    """(source ids, target inputs, targets) of every piece of every row, sorted; checks how they are laid out."""
    batch = rows.cut(range(len(rows)), [0] * len(rows), seed=0)
    found = []
    for row in range(len(rows)):
        for number in range(1, max(batch.segments_BT[row].max(), batch.source.segments_BS[row].max()) + 1):
            there = batch.segments_BT[row] == number
            source_there = batch.source.segments_BS[row] == number
            assert batch.positions_BT[row, there].tolist() == list(range(there.sum()))
            assert batch.source.positions_BS[row, source_there].tolist() == list(range(source_there.sum()))
            ids = (batch.source.tokens_BS[row, source_there], batch.tokens_BT[row, there], batch.targets_BT[row, there])
            found.append(tuple(x.tolist() for x in ids))
        padding = batch.segments_BT[row] == 0
        assert not batch.tokens_BT[row, padding].any() and not batch.weights_BT[row, padding].any()
    assert batch.weights_BT.sum() == sum(len(targets) for *_, targets in found) == rows.tokens
    assert sum(len(source) for source, *_ in found) == rows.source_tokens
    return sorted(found)


@pytest.mark.parametrize("packing", ["best_fit", "padded"])
def test_every_pair_is_in_a_row_once_and_whole(store, packing):
    rows = rows_of(store, packing=packing)
    expected = []
    for pair in range(len(TEXTS)):
        source, target = source_ids(store, pair).tolist(), target_ids(store, pair).tolist()
        assert target[-1] == source[-1] == ByteTokenizer().eos
        expected.append((source, [START, *target[:-1]], target))
    assert pieces_of(rows) == sorted(expected)
    assert rows.counts == Counts(0, 0, 0, 0, 0)
    assert rows.pairs == len(TEXTS)
    assert (len(rows) == len(TEXTS)) == (packing == "padded")


def test_what_is_too_long_is_cut_and_counted(store):
    rows = rows_of(store, source=6, target=5)
    assert rows.counts == Counts(empty=0, uneven=0, long=0, cut_sources=1, cut_targets=1)
    source, inputs, targets = next(each for each in pieces_of(rows) if len(each[0]) == 6)
    assert source == [*b"a lon", ByteTokenizer().eos], "the end of a source stays its end"
    assert (inputs, targets) == ([START, *b"and "], [*b"and a"]), "EOS follows only a target that is whole"


def test_what_is_too_long_is_dropped_and_counted(store):
    rows = rows_of(store, source=6, target=5, drop=True)
    assert rows.counts == Counts(empty=0, uneven=0, long=1, cut_sources=0, cut_targets=0)
    assert rows.pairs == len(TEXTS) - 1


def test_uneven_pairs_are_left_out_and_counted(store):
    rows = rows_of(store, ratio=2.0)
    assert rows.counts.uneven == 1 and rows.pairs == len(TEXTS) - 1, "a: one, of 1 byte and 3"


def test_limits_that_leave_nothing_say_why():
    store = store_of([("a" * 30, "b"), ("c", "d" * 9)])
    with pytest.raises(InputError, match=r"no pair .* 2 are more uneven than data.max_length_ratio 3.0"):
        rows_of(store, ratio=3.0)
    with pytest.raises(InputError, match=r"2 are longer than data.source_context 8 or data.context 4"):
        rows_of(store, source=8, target=4, drop=True)


def test_a_source_row_has_room_for_more_than_its_end(store):
    with pytest.raises(InputError, match="data.source_context is 1, and EOS takes that: use 2 or more"):
        rows_of(store, source=1)
    assert rows_of(store, source=2, target=1).counts.cut_targets == len(TEXTS), "not even one token and EOS fit"


def test_a_text_that_is_no_pair_is_named():
    with pytest.raises(InputError, match="0 in .* is no pair but one text.*: use pairs:GLOB.tsv"):
        sides(corpus_of(Document("0", "text")))
    with pytest.raises(InputError, match="tokens:ids.bin is ready ids, which are no pairs.* use pairs:GLOB.tsv"):
        sides(TokenFiles("tokens:ids.bin", ()))


@pytest.mark.parametrize("seed", range(3))
def test_rows_hold_what_fits_and_are_well_filled(seed):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 24, (2, 500))
    rows = list(pair_bins.best_fit(*lengths, source=64, target=48))
    assert sorted(np.concatenate(rows).tolist()) == list(range(500))
    used = np.array([[lengths[side][row].sum() for row in rows] for side in (0, 1)])
    assert used[0].max() <= 64 and used[1].max() <= 48
    assert used[1].sum() / (len(rows) * 48) > 0.9, "targets are what fills a row here"


def test_batches_of_pairs_are_functions_of_seed_and_step(store):
    more = store_of([(f"{n}", f"{n} times") for n in range(9)])

    def pipeline(seed: int) -> Pipeline:
        return Pipeline([(1.0, rows_of(store)), (1.0, rows_of(more))], batch_size=4, seed=seed)

    one, again, other = pipeline(0), pipeline(0), pipeline(1)
    assert one.source_context == 20
    assert 0 < one.source_fill(50) <= 1
    streamed = again.iterate(3)
    for step in (3, 4):
        batch, expected = next(streamed), one.batch_at(step)
        for array, same in zip((*batch[:-1], *batch.source), (*expected[:-1], *expected.source), strict=True):
            np.testing.assert_array_equal(array, same)
    assert any((one.batch_at(s).targets_BT != other.batch_at(s).targets_BT).any() for s in range(3))
