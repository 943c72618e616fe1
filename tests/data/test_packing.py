import numpy as np
import pytest

from lm.data.packing import cut_rows

# Documents of every awkward size: empty, one id, longer than rows, at the ends and beside each other.
SIZES = [[5], [1, 1, 1], [0, 3, 0, 0, 7, 1, 0], [30], [2, 17, 4, 1, 8], [0, 0, 1, 9, 0]]


def reference(ids, offsets, start, length, context):
    """A row, id by id."""
    size = len(ids)
    document = {p: d for d in range(len(offsets) - 1) for p in range(offsets[d], offsets[d + 1])}
    tokens, targets, weights, segments, positions = ([0] * context for _ in range(5))
    for t in range(length):
        p = (start + t) % size
        begins = t == 0 or p in offsets[:-1]
        tokens[t] = ids[p]
        segments[t] = 1 if t == 0 else segments[t - 1] + begins
        positions[t] = 0 if begins else positions[t - 1] + 1
        if p + 1 < size and document[p] == document[p + 1]:
            targets[t], weights[t] = ids[p + 1], 1
    return tokens, targets, weights, segments, positions


def stream(sizes):
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return (np.arange(offsets[-1]) + 100).astype(np.uint16), offsets


def epoch(ids, offsets, *, context, first_cut):
    begins = np.arange(0, len(ids), context)
    lengths = np.minimum(context, len(ids) - begins)
    return begins, lengths, cut_rows(ids, offsets, (begins + first_cut) % len(ids), lengths, context=context)


def cases():
    draw = np.random.default_rng(0)
    for sizes in [*SIZES, *(draw.integers(0, 12, draw.integers(1, 15)).tolist() for _ in range(40))]:
        for context in (1, 2, 3, 7, 16):
            if sum(sizes) >= context:
                yield sizes, context, int(draw.integers(sum(sizes)))


@pytest.mark.parametrize("first", [True, False])
def test_rows_equal_the_plain_definition(first):
    for sizes, context, cut in cases():
        ids, offsets = stream(sizes)
        cut = 0 if first else cut
        begins, lengths, rows = epoch(ids, offsets, context=context, first_cut=cut)
        for r in range(len(begins)):
            expected = reference(ids.tolist(), offsets.tolist(), (begins[r] + cut) % len(ids), int(lengths[r]), context)
            for name, found, wanted in zip(rows._fields, rows, expected, strict=True):
                assert found[r].tolist() == wanted, (name, sizes, context, cut, r)


def test_an_epoch_has_every_id_once_and_every_id_but_each_documents_first_as_a_target_once():
    for sizes, context, cut in cases():
        ids, offsets = stream(sizes)
        rows = epoch(ids, offsets, context=context, first_cut=cut)[2]
        assert sorted(rows.tokens_BT[rows.segments_BT > 0].tolist()) == ids.tolist()
        firsts = {int(ids[start]) for start, size in zip(offsets, sizes, strict=False) if size}
        assert sorted(rows.targets_BT[rows.weights_BT > 0].tolist()) == sorted(set(ids.tolist()) - firsts)


def test_a_single_document_does_not_run_into_its_own_start():
    ids, offsets = stream([10])
    rows = cut_rows(ids, offsets, np.array([7]), np.array([6]), context=6)
    assert rows.segments_BT.tolist() == [[1, 1, 1, 2, 2, 2]]
    assert rows.weights_BT.tolist() == [[1, 1, 0, 1, 1, 1]]


def test_dtypes_and_padding():
    ids, offsets = stream([3, 4])
    rows = cut_rows(ids, offsets, np.array([5]), np.array([2]), context=4)
    assert [array.dtype for array in rows] == [np.int32, np.int32, np.float32, np.int32, np.int32]
    assert [array[0, 2:].tolist() for array in rows] == [[0, 0]] * 5


def test_a_row_longer_than_the_stream_is_refused():
    ids, offsets = stream([3])
    with pytest.raises(ValueError, match="a row of 4 ids"):
        cut_rows(ids, offsets, np.array([0]), np.array([4]), context=8)
