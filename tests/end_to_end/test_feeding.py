"""The global batch of a step, fed by one process or by several: each reads its own rows, and together they hold it."""

from __future__ import annotations

import json
import socket

import numpy as np
import pytest

from lm.data.corpus import open_corpus
from lm.data.packing import arrays_of
from lm.data.pipeline import Pipeline
from lm.data.rows import make_rows
from lm.data.tokenizer import ByteTokenizer
from lm.data.tokens import tokenize

from . import commands

PROGRAM = """
import json, sys
source, address, number, processes, threads, first = sys.argv[1:]
import jax
if int(processes) > 1:
    jax.distributed.initialize(address, int(processes), int(number))
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh
from lm.config import ParallelConfig
from lm.data.corpus import open_corpus
from lm.data.packing import arrays_of
from lm.data.pipeline import Pipeline
from lm.data.rows import make_rows
from lm.data.tokenizer import ByteTokenizer
from lm.data.tokens import tokenize
from lm.parallel import make_mesh, own_rows, put_rows

store = tokenize(open_corpus(source), ByteTokenizer())
rows = make_rows(store, context=32, packing="split", prompt_loss=False)
pipeline = Pipeline([(1.0, rows)], batch_size=8, seed=3)
mesh = make_mesh(ParallelConfig())
own = own_rows(mesh, 8)
batches = pipeline.iterate(int(first), own, threads=int(threads))
found = []
for _ in range(3):
    batch = next(batches)
    assert len(batch.tokens_BT) == 8 // int(processes), "a process reads its own rows alone"
    whole = process_allgather(put_rows(mesh, batch), tiled=True)
    found.append([np.asarray(array).tolist() for array in arrays_of(whole)])
batches.close()
# a mesh on which the devices of processes alternate, as on some tori: a process reads more than it needs
apart = Mesh(mesh.devices.reshape(2, -1).T.reshape(mesh.devices.shape), mesh.axis_names)
whole = process_allgather(put_rows(apart, pipeline.batch_at(int(first), own_rows(apart, 8))), tiled=True)
assert [np.asarray(array).tolist() for array in arrays_of(whole)] == found[0], "rows that lie apart"
if int(number) == 0:
    print(json.dumps(found))
"""


@pytest.mark.parametrize(("processes", "threads", "first"), [(1, 4, 7), (2, 1, 7), (4, 2, 8)])
def test_processes_and_threads_change_no_batch(source, processes, threads, first):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = [
        commands.start(["-c", PROGRAM, source, address, number, processes, threads, first], devices=4 // processes)
        for number in range(processes)
    ]
    results = [commands.finish(process) for process in started]
    assert [result.status for result in results] == [0] * processes, results
    store = tokenize(open_corpus(source), ByteTokenizer())
    rows = make_rows(store, context=32, packing="split", prompt_loss=False)
    pipeline = Pipeline([(1.0, rows)], batch_size=8, seed=3)
    for step, batch in enumerate(json.loads(results[0].stdout.splitlines()[-1]), start=first):
        for found, expected in zip(batch, arrays_of(pipeline.batch_at(step)), strict=True):
            np.testing.assert_array_equal(found, expected)
