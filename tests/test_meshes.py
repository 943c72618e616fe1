"""No mesh and no strategy changes the losses: ten steps on eight devices are those of one."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from lm.config import ParallelConfig
from lm.parallel import make_mesh

from .training.ten_steps import batch_at, losses, pairs_at, run_config

pytestmark = pytest.mark.thorough

MESHES = {
    "data=8": ParallelConfig(),
    "fsdp=8": ParallelConfig(fsdp=8),
    "data=2,fsdp=4": ParallelConfig(data=2, fsdp=4),
    "fsdp=4,tensor=2": ParallelConfig(fsdp=4, tensor=2),
    "data=2,fsdp=2,tensor=2": ParallelConfig(data=2, fsdp=2, tensor=2),
    "pmap": ParallelConfig(strategy="pmap"),
}
MODELS = {
    "gpt2": {"scan_layers": True, "remat": True},
    "llama": {"scan_layers": False},
    "t5": {"scan_layers": True, "remat": True},
}
"""Two of them scanned and recomputed, one unrolled; the last reads sources and is smoothed."""


def config_of(name):
    """Two micro-batches, and dropout: on probabilities of attention, embeddings and the outputs of sublayers."""
    cfg = run_config(name, dropout=0.1, gradient_accumulation=2, vocab_multiple=8, **MODELS[name])
    smoothing = 0.1 if cfg.model.has_encoder else None
    return dataclasses.replace(cfg, training=dataclasses.replace(cfg.training, label_smoothing=smoothing))


@pytest.fixture(scope="module")
def alone(one_device):
    """The losses of each model on one device."""
    return {name: losses(config_of(name), one_device) for name in MODELS}


def test_the_rows_are_packed():
    """Several documents in most rows, and padding in some."""
    segments_BT = batch_at(0).segments_BT
    assert (segments_BT.max(axis=1) > 1).mean() > 0.5 and (segments_BT == 0).any()
    assert (pairs_at(0).source.segments_BS.max(axis=1) > 1).mean() > 0.5


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", MODELS)
def test_ten_steps_equal_one_device(name, mesh, alone):
    """float32, 1e-5 relative: the reduction over devices sums in another order."""
    parallel = MESHES[mesh]
    cfg = dataclasses.replace(config_of(name), parallel=parallel)
    found, state = losses(cfg, make_mesh(parallel), with_state=True)
    np.testing.assert_allclose(found, alone[name], rtol=1e-5)
    assert len(set(found)) == 10 and (name != "t5" or found[-1] < found[0] - 0.2)
    matrix = state.params["layers"]["feed_forward"]["up"]
    moment = state.opt_state[1].mu["layers"]["feed_forward"]["up"]
    for array in (matrix, moment):
        assert len(array.addressable_shards) == jax.device_count()
        parts = parallel.fsdp * parallel.tensor
        assert array.addressable_shards[0].data.size * parts == array.size, "each device holds its part alone"
