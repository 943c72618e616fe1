import subprocess
import sys
import threading

import numpy as np
import pytest

from lm.config import InputError
from lm.data.pipeline import Batch, Pipeline
from lm.data.tokenizer import ByteTokenizer
from lm.data.tokens import tokenize


@pytest.fixture
def store(corpus_of):
    draw = np.random.default_rng(1)
    return tokenize(corpus_of(*("".join(map(chr, draw.integers(97, 123, n))) for n in range(40))), ByteTokenizer())


def assert_same(one, other):
    for name, a, b in zip(Batch._fields, one, other, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_sizes(store):
    pipeline = Pipeline(store, context=16, batch_size=6, seed=0)
    assert store.num_tokens == 860
    assert (pipeline.rows_per_epoch, pipeline.tokens_per_step) == (54, 96)
    assert all(array.shape == (6, 16) for array in pipeline.batch_at(0))


def test_a_batch_depends_on_seed_and_step_alone(store):
    forward = [Pipeline(store, context=16, batch_size=6, seed=3).batch_at(step) for step in range(30)]
    fresh = Pipeline(store, context=16, batch_size=6, seed=3)
    for step in reversed(range(30)):
        assert_same(fresh.batch_at(step), forward[step])
    other = Pipeline(store, context=16, batch_size=6, seed=4).batch_at(0)
    assert (other.tokens_BT != forward[0].tokens_BT).any()


def test_hosts_rows_make_up_the_global_batch(store):
    pipeline = Pipeline(store, context=16, batch_size=6, seed=0)
    for step in (0, 8, 9, 1000):
        parts = [pipeline.batch_at(step, slice(low, low + 2)) for low in (0, 2, 4)]
        assert_same(Batch(*map(np.concatenate, zip(*parts, strict=True))), pipeline.batch_at(step))


def test_rows_do_not_depend_on_the_batch_they_are_in(store):
    small, large = (Pipeline(store, context=16, batch_size=size, seed=0) for size in (2, 6))
    parts = [small.batch_at(step) for step in (27, 28, 29)]
    assert_same(Batch(*map(np.concatenate, zip(*parts, strict=True))), large.batch_at(9))


@pytest.mark.parametrize("context", [16, 43])
def test_each_epoch_is_a_permutation_of_the_text_in_cuts_of_its_own(store, context):
    pipeline = Pipeline(store, context=context, batch_size=1, seed=0)
    epochs = []
    for epoch in range(3):
        steps = range(epoch * pipeline.rows_per_epoch, (epoch + 1) * pipeline.rows_per_epoch)
        rows = [pipeline.batch_at(step) for step in steps]
        ids = np.concatenate([row.tokens_BT[row.segments_BT > 0] for row in rows])
        np.testing.assert_array_equal(np.sort(ids), np.sort(store.ids))
        assert sum(row.weights_BT.sum() for row in rows) == store.num_tokens - len(store)
        epochs.append({row.tokens_BT.tobytes() for row in rows})
    assert len(epochs[0] & epochs[1]) < 3
    assert len(epochs[1] & epochs[2]) < 3


def test_iterate_gives_the_batches_from_a_step_on(store):
    pipeline = Pipeline(store, context=16, batch_size=6, seed=0)
    for rows in (None, slice(2, 4)):
        batches = pipeline.iterate(7, rows)
        for step in range(7, 40):
            batch = next(batches)
            assert isinstance(batch, Batch)
            assert_same(batch, pipeline.batch_at(step, rows))
        batches.close()


def test_iterate_leaves_no_thread_behind_when_closed(store):
    before = set(threading.enumerate())
    batches = Pipeline(store, context=16, batch_size=6, seed=0).iterate()
    next(batches)
    batches.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_a_program_can_end_in_the_middle_of_iterating():
    program = (
        "from lm.data import corpus, pipeline, tokenizer, tokens\n"
        "text = corpus.Corpus('memory', ['doc'], lambda index: 'text ' * 100)\n"
        "store = tokens.tokenize(text, tokenizer.ByteTokenizer())\n"
        "batches = pipeline.Pipeline(store, context=8, batch_size=2, seed=0).iterate(); next(batches)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


def test_an_error_while_prefetching_reaches_the_reader(store, monkeypatch):
    pipeline = Pipeline(store, context=16, batch_size=6, seed=0)
    monkeypatch.setattr(pipeline, "batch_at", lambda step, rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(pipeline.iterate())


def test_text_shorter_than_a_row(store):
    assert Pipeline(store, context=860, batch_size=1, seed=0).rows_per_epoch == 1
    with pytest.raises(InputError, match="memory has 860 tokens, less than one row of data.context 861.*at most 860"):
        Pipeline(store, context=861, batch_size=1, seed=0)
