"""Rows against their plain definition, id by id, for every kind of packing."""

import functools

import jax
import numpy as np
import pytest

from lm.data.packing import arrays_of
from lm.data.rows import make_rows
from lm.data.runs import cut_runs
from lm.nn import language_model, params

from ..conftest import SHAPES, VOCABULARY, resolved
from .memory_store import store_of

# Documents of every awkward size: empty, one id, longer than rows, at the ends and beside each other.
SIZES = [[5], [1, 1, 1], [0, 3, 0, 0, 7, 1, 0], [30], [2, 17, 4, 1, 8], [0, 0, 1, 9, 0], [14, 7, 7, 21, 16, 32]]
PACKINGS = ("split", "best_fit", "padded")


def cases():
    draw = np.random.default_rng(0)
    for sizes in [*SIZES, *(draw.integers(0, 12, draw.integers(1, 15)).tolist() for _ in range(40))]:
        for context in (1, 2, 3, 7, 16):
            if sum(sizes) >= context:
                yield sizes, context, int(draw.integers(sum(sizes)))


def reference(store, start, length, context, prompts=None):
    """A run of the circular stream as a row, id by id."""
    ids, offsets, size = store.ids.tolist(), store.offsets.values.tolist(), store.num_tokens
    document = {p: d for d in range(len(offsets) - 1) for p in range(offsets[d], offsets[d + 1])}
    tokens, targets, weights, segments, positions = ([0] * context for _ in range(5))
    for t in range(length):
        p = (start + t) % size
        begins = t == 0 or p in offsets[:-1]
        tokens[t] = ids[p]
        segments[t] = 1 if t == 0 else segments[t - 1] + begins
        positions[t] = 0 if begins else positions[t - 1] + 1
        if p + 1 < size and document[p] == document[p + 1]:
            d = document[p]
            if prompts is None or p + 1 - offsets[d] >= prompts[d]:
                targets[t], weights[t] = ids[p + 1], 1
    return tokens, targets, weights, segments, positions


def prompts_for(sizes):
    """A prompt of any length from none to the whole document."""
    return [int(np.random.default_rng(d).integers(size + 1)) for d, size in enumerate(sizes)]


def runs(store, context, cut):
    begins = np.arange(0, store.num_tokens, context)
    lengths = np.minimum(context, store.num_tokens - begins)
    return ((begins + cut) % store.num_tokens).tolist(), lengths.tolist()


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("first", [True, False])
def test_runs_equal_the_plain_definition(first, prompted):
    for sizes, context, cut in cases():
        prompts = prompts_for(sizes) if prompted else None
        store = store_of(sizes, prompts=prompts)
        starts, lengths = runs(store, context, 0 if first else cut)
        rows = cut_runs(store, starts, lengths, context=context, prompts=store.prompts)
        for r, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            expected = reference(store, start, length, context, prompts)
            for name, found, wanted in zip(rows._fields, arrays_of(rows), expected, strict=False):
                assert found[r].tolist() == wanted, (name, sizes, context, cut, r)


def epoch_of(store, packing, context, epoch, prompt_loss=False):
    rows = make_rows(store, context=context, packing=packing, prompt_loss=prompt_loss)
    return rows.cut(range(len(rows)), [epoch] * len(rows), seed=0)


def pieces_of(store, batch):
    """Every piece of a batch: (first id's place in the stream, tokens, targets, weights, positions)."""
    for r in range(len(batch.tokens_BT)):
        segments = batch.segments_BT[r]
        filled = segments[segments > 0]
        assert len(filled) and (segments[: len(filled)] > 0).all(), "padding comes last"
        assert np.unique(filled).tolist() == list(range(1, filled[-1] + 1)) and (np.diff(filled) >= 0).all()
        for array in arrays_of(batch):
            assert not array[r, len(filled) :].any()
        for number in range(1, filled[-1] + 1):
            here = segments == number
            yield (int(batch.tokens_BT[r][here][0]) - 100, *(array[r][here] for array in (*batch[:3], batch[4])))


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("packing", PACKINGS)
def test_an_epoch_has_every_id_once_and_every_next_id_once_as_a_target(packing, prompted):
    for sizes, context, _ in cases():
        prompts = prompts_for(sizes) if prompted else None
        store = store_of(sizes, prompts=prompts)
        offsets = store.offsets.values
        for epoch in (0, 1):
            inputs, targets = [], []
            for start, tokens, wanted, weights, positions in pieces_of(store, epoch_of(store, packing, context, epoch)):
                assert tokens.tolist() == store.ids[start : start + len(tokens)].tolist()
                document = store.offsets.before(start + 1) - 1
                assert start + len(tokens) <= offsets[document + 1], "a piece lies in one document"
                assert positions.tolist() == list(range(len(tokens)))
                assert (wanted[weights > 0] == tokens[weights > 0] + 1).all() and not wanted[weights == 0].any()
                inputs += tokens.tolist()
                targets += wanted[weights > 0].tolist()
            skip = [max(1, prompt) for prompt in prompts or [0] * len(sizes)]
            expected = [store.ids[a + n : b] for a, b, n in zip(offsets[:-1], offsets[1:], skip, strict=True)]
            assert sorted(inputs) == store.ids.tolist(), (sizes, context, epoch)
            assert sorted(targets) == np.concatenate(expected).tolist(), (sizes, context, epoch)


@pytest.mark.parametrize("packing", PACKINGS)
def test_prompts_are_trained_on_if_that_is_asked_for(packing):
    sizes = SIZES[-1]
    with_prompts, without = store_of(sizes, prompts=prompts_for(sizes)), store_of(sizes)
    trained = epoch_of(with_prompts, packing, 7, 0, prompt_loss=True)
    for found, wanted in zip(arrays_of(trained), arrays_of(epoch_of(without, packing, 7, 0)), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert epoch_of(with_prompts, packing, 7, 0).weights_BT.sum() < trained.weights_BT.sum()


def test_a_single_document_does_not_run_into_its_own_start():
    rows = cut_runs(store_of([10]), [7], [6], context=6)
    assert rows.segments_BT.tolist() == [[1, 1, 1, 2, 2, 2]]
    assert rows.weights_BT.tolist() == [[1, 1, 0, 1, 1, 1]]


def test_dtypes_padding_and_layout():
    rows = cut_runs(store_of([3, 9]), [5], [2], context=4)
    assert [array.dtype for array in arrays_of(rows)] == [np.int32, np.int32, np.float32, np.int32, np.int32]
    assert [array[0, 2:].tolist() for array in arrays_of(rows)] == [[0, 0]] * 5
    assert rows.targets_BT[0, 1] == 107, "the id after the row, though the row isn't full"
    assert all(array.flags.c_contiguous for array in arrays_of(rows)), "what a device takes without a copy"


def test_a_row_longer_than_the_stream_is_refused():
    with pytest.raises(AssertionError, match="longer than the stream"):
        cut_runs(store_of([3]), [0], [4], context=8)


@functools.partial(jax.jit, static_argnums=0)
def losses(cfg, tree, batch):
    nll_BT = language_model.nll(
        tree, batch.tokens_BT, batch.targets_BT, batch.segments_BT, batch.positions_BT,
        cfg=cfg, dropout_keys_B=None, constrain=language_model.unconstrained,
    )  # fmt: skip
    return (nll_BT * batch.weights_BT).sum(1)


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_the_loss_of_a_packed_row_is_the_sum_of_its_pieces_alone(packing):
    context, cfg = 16, resolved(SHAPES["llama"])
    tree = params.initialize(language_model.model_specs(cfg), jax.random.key(0))
    packed = epoch_of(store_of([3, 9, 1, 5, 20, 16, 2, 7, 6], vocabulary=VOCABULARY), packing, context, 0)
    alone = [np.zeros((0, context), array.dtype) for array in arrays_of(packed)]
    row_of = []
    for r, segments in enumerate(packed.segments_BT):
        for number in range(1, segments.max() + 1):
            here = segments == number
            piece = [np.zeros((1, context), array.dtype) for array in arrays_of(packed)]
            for whole, array in zip(piece, arrays_of(packed), strict=True):
                whole[0, : here.sum()] = array[r][here]
            piece[3] = np.minimum(piece[3], 1)
            alone = [np.concatenate(pair) for pair in zip(alone, piece, strict=True)]
            row_of.append(r)
    assert len(row_of) > len(packed.tokens_BT), "some rows must hold several pieces"
    summed = np.bincount(row_of, np.asarray(losses(cfg, tree, type(packed)(*alone)), np.float64))
    found = losses(cfg, tree, packed)
    np.testing.assert_allclose(found, summed, rtol=1e-5)  # float32, other order of summation
    blind = losses(cfg, tree, packed._replace(segments_BT=np.minimum(packed.segments_BT, 1)))
    assert np.abs(blind - found).max() > 1e-3, "without segments the pieces see one another"
