import functools
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest

from lm.config import InputError
from lm.data.packing import arrays_of, of_arrays
from lm.data.pipeline import Batch, Pipeline
from lm.data.rows import make_rows

from .memory_store import store_of

SIZES = [*range(2, 42)]
PACKINGS = ("split", "best_fit", "padded")


@pytest.fixture
def store(tmp_path):
    """860 ids, every one another, read from disk."""
    return store_of(SIZES).on_disk(tmp_path)


def pipeline_of(*stores, context=16, batch_size=6, seed=0, packing="split", weights=None):
    rows = [make_rows(store, context=context, packing=packing, prompt_loss=False) for store in stores]
    weights = weights or [1.0] * len(stores)
    return Pipeline(list(zip(weights, rows, strict=True)), batch_size=batch_size, seed=seed)


def mixed(store, **options):
    """A mixture of a store, twice, and of another one."""
    return pipeline_of(store, store_of([5, 80, 3] * 10), store, weights=[0.5, 0.3, 0.2], **options)


KINDS = {packing: functools.partial(pipeline_of, packing=packing) for packing in PACKINGS} | {"mixture": mixed}


@pytest.fixture(params=KINDS)
def make(request, store):
    """Makes a pipeline of a kind, of the same text each time."""
    return lambda **options: KINDS[request.param](store, **options)


def assert_same(one, other):
    assert one.source is None and other.source is None
    for name, a, b in zip(Batch._fields, arrays_of(one), arrays_of(other), strict=False):
        np.testing.assert_array_equal(a, b, err_msg=name)


def joined(parts):
    return of_arrays(list(map(np.concatenate, zip(*map(arrays_of, parts), strict=True))))


def test_sizes(store):
    pipeline = pipeline_of(store)
    assert store.num_tokens == 860
    assert (pipeline.rows_per_epoch, pipeline.tokens_per_step, pipeline.context, pipeline.batch_size) == (54, 96, 16, 6)
    assert all(array.shape == (6, 16) for array in arrays_of(pipeline.batch_at(0)))


def test_a_batch_depends_on_seed_and_step_alone(make):
    forward = [make(seed=3).batch_at(step) for step in range(30)]
    fresh = make(seed=3)
    for step in reversed(range(30)):
        assert_same(fresh.batch_at(step), forward[step])
    assert (make(seed=4).batch_at(0).tokens_BT != forward[0].tokens_BT).any()


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_rows_make_up_the_global_batch(make, hosts):
    pipeline = make(batch_size=8)
    for step in (0, 8, 9, 1000):
        each = 8 // hosts
        parts = [pipeline.batch_at(step, slice(host * each, (host + 1) * each)) for host in range(hosts)]
        assert_same(joined(parts), pipeline.batch_at(step))


def test_rows_do_not_depend_on_the_batch_they_are_in(make):
    small, large = (make(batch_size=size) for size in (2, 6))
    assert_same(joined([small.batch_at(step) for step in (27, 28, 29)]), large.batch_at(9))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("context", [16, 43])
def test_each_epoch_is_a_permutation_of_the_text_in_an_order_of_its_own(store, context, packing):
    pipeline = pipeline_of(store, context=context, batch_size=1, packing=packing)
    orders, rows = [], []
    for epoch in range(3):
        steps = range(epoch * pipeline.rows_per_epoch, (epoch + 1) * pipeline.rows_per_epoch)
        batches = [pipeline.batch_at(step) for step in steps]
        ids = np.concatenate([batch.tokens_BT[batch.segments_BT > 0] for batch in batches])
        np.testing.assert_array_equal(np.sort(ids), store.read(0, 860))
        assert sum(batch.weights_BT.sum() for batch in batches) == store.num_tokens - len(store)
        orders.append([batch.tokens_BT.tobytes() for batch in batches])
        rows.append(set(orders[-1]))
    assert orders[0] != orders[1] != orders[2]
    same = [len(rows[0] & rows[1]), len(rows[1] & rows[2])]
    # Only cuts can fall elsewhere in another epoch; what a plan has packed stays together.
    assert max(same) < 3 if packing == "split" else min(same) == pipeline.rows_per_epoch


def test_each_component_of_a_mixture_goes_through_epochs_of_its_own():
    stores = store_of([40] * 8), store_of([8] * 9)
    stores[1].ids += 1000
    pipeline = pipeline_of(*stores, context=8, batch_size=4, weights=[0.75, 0.25])
    assert pipeline.rows_per_epoch == 40 + 9
    assert pipeline.shares(25) == [0.75, 0.25]
    rows = joined([pipeline.batch_at(step) for step in range(36)])
    first, second = rows.tokens_BT[rows.tokens_BT[:, 0] < 1000], rows.tokens_BT[rows.tokens_BT[:, 0] >= 1000]
    assert (len(first), len(second)) == (108, 36)
    for found, store in ((first, stores[0]), (second, stores[1])):
        size = store.num_tokens // 8
        for low in range(0, len(found) - size + 1, size):
            np.testing.assert_array_equal(np.sort(found[low : low + size], axis=None), store.ids)


def test_the_same_text_twice_in_a_mixture_shows_other_rows_at_a_time(store):
    rows = joined([pipeline_of(store, store, batch_size=2).batch_at(step) for step in range(54)])
    one, two = rows.tokens_BT[::2], rows.tokens_BT[1::2]
    assert not (one == two).all(1).any()
    assert not {row.tobytes() for row in one} & {row.tobytes() for row in two[:-1]}, "their cuts differ too"


def test_the_first_component_is_in_the_order_it_has_alone(store):
    alone, both = pipeline_of(store, batch_size=1), pipeline_of(store, store_of([50]), batch_size=1)
    located = [both._mixture.locate(step) for step in range(200)]
    assert 80 < sum(component == 0 for component, _ in located) < 120
    for step, (component, index) in enumerate(located):
        if component == 0:
            assert_same(both.batch_at(step), alone.batch_at(index))


def test_weights_are_shares_of_the_tokens_however_full_the_rows_are(store):
    """Short documents fill a little of each padded row."""
    pipeline = pipeline_of(store_of([5] * 30), store_of([16] * 30), packing="padded", batch_size=4)
    assert pipeline.shares(1000) == pytest.approx([0.5, 0.5], abs=1e-3)
    first = [pipeline._mixture.locate(row)[0] for row in range(2100)]
    assert first.count(0) == pytest.approx(1600, abs=3), "16 to 5, as the tokens in their rows"
    assert pipeline.tokens_per_step == round(4 * 16 * pipeline.fill(1000)) == round(4 * 2 * 80 / 21)


def test_fill_is_the_part_of_positions_that_hold_tokens(make):
    pipeline = make()
    segments = np.concatenate([pipeline.batch_at(step).segments_BT for step in range(60)])
    assert pipeline.fill(60) == pytest.approx((segments > 0).mean(), abs=0.02)  # few epochs, of which one is cut short


def test_best_fit_fills_more_than_padded_and_splits_less(store):
    assert pipeline_of(store, packing="padded", context=64).fill(1) == pytest.approx(860 / (40 * 64))
    assert pipeline_of(store, packing="best_fit", context=64).fill(1) > 0.95


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_iterate_gives_the_batches_from_a_step_on(make, threads):
    pipeline = make()
    for begin, rows in ((0, None), (7, slice(2, 4)), (int(np.random.default_rng(threads).integers(10**6)), None)):
        batches = pipeline.iterate(begin, rows, threads=threads)
        for step in range(begin, begin + 20):
            batch = next(batches)
            assert isinstance(batch, Batch)
            assert_same(batch, pipeline.batch_at(step, rows))
        batches.close()


@pytest.mark.parametrize("close", [True, False])
def test_iterate_leaves_no_thread_behind(store, close):
    before = set(threading.enumerate())
    batches = pipeline_of(store).iterate()
    next(batches)
    assert set(threading.enumerate()) - before
    if close:
        batches.close()
    del batches  # a reader that just stops
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_a_program_can_end_in_the_middle_of_iterating():
    program = (
        "from lm.data.pipeline import Pipeline; from lm.data.rows import make_rows\n"
        "from tests.data.memory_store import store_of\n"
        "rows = make_rows(store_of([500]), context=8, packing='split', prompt_loss=False)\n"
        "batches = Pipeline([(1.0, rows)], batch_size=2, seed=0).iterate(); next(batches)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_store_cut_short_while_training_is_told_to_the_reader(store, tmp_path, packing):
    batches = pipeline_of(store, packing=packing).iterate()
    next(batches)
    (tmp_path / "ids.bin").write_bytes(b"")
    with pytest.raises(InputError, match="ids.bin is damaged: it has 0 bytes, not the 1720"):
        for _ in range(20):
            next(batches)


def test_text_shorter_than_a_row(store):
    assert pipeline_of(store, context=860, batch_size=1).rows_per_epoch == 1
    with pytest.raises(InputError, match="memory has 860 tokens, less than one row of data.context 861.*at most 860"):
        pipeline_of(store, context=861, batch_size=1)


def test_a_far_step_costs_no_more_reads_than_the_first(store):
    """However far a step is, nothing before it is gone through."""
    counts = Counter()
    read = store.read
    store.read = lambda start, stop: (counts.update([step]), read(start, stop))[1]
    pipeline = pipeline_of(store)
    for step in (1, 10**12):
        pipeline.batch_at(step)
    assert set(counts) == {1, 10**12} and max(counts.values()) <= 7  # a row each, one perhaps over the stream's end
