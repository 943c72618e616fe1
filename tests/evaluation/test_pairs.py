"""The evaluator of pairs: each token of each target scored once, given its own source, however it is batched."""

from __future__ import annotations

import functools
import math

import jax
import numpy as np
import pytest

from lm.config import InputError, ModelConfig, ParallelConfig, RunConfig
from lm.data.pair_rows import PairRows
from lm.data.pairs import Limits, tokenize_pairs
from lm.data.sources.document import Document
from lm.data.tokenizer import ByteTokenizer
from lm.evaluation.pairs import PairEvaluator
from lm.nn import language_model, params
from lm.nn.source import Source
from lm.parallel import RULES, make_mesh, parameter_shardings
from tests.data.memory_corpus import corpus_of

PAIRS = [
    ("the cat sat on the mat", "le chat était assis sur le tapis"),
    ("x", "y"),
    ("a long source of several words, and more", "court"),
    ("short", "une cible bien plus longue que sa source ne l'est"),
    ("žluťoučký", "kůň 👩‍🚀"),
    ("a cat", "un chat noir"),
]
COMPILED = jax.jit(language_model.apply, static_argnames="cfg")
SHAPES = ["rotary", "learned", "relative", "sinusoidal"]


@pytest.fixture(scope="module")
def store():
    documents = (Document(f"doc{n}", target, source) for n, (source, target) in enumerate(PAIRS))
    return tokenize_pairs(corpus_of(*documents), ByteTokenizer(), ByteTokenizer())


def model(positions: str = "rotary", **fields) -> ModelConfig:
    """A small encoder–decoder of bytes; every target follows BOS."""
    own = {"num_layers": 2, "encoder_layers": 1, "d_model": 32, "num_heads": 2, "init_std": 0.3, **fields}
    config = RunConfig(model=ModelConfig(family="encoder_decoder", positions=positions, **own))
    return config.resolve(258, first_id=ByteTokenizer().bos).model


def drawn(cfg: ModelConfig):
    return params.initialize(language_model.model_specs(cfg), jax.random.key(0))


def evaluator(cfg, store, mesh, **more):
    options = {"batch_size": 3, "mesh": mesh, **more}
    return PairEvaluator(cfg, store, ByteTokenizer(), None, **options)


def plain_nats(cfg: ModelConfig, tree, source: str, target: str) -> np.ndarray:
    """Of one pair: rows of exactly its length, softmax in float64."""
    tokenizer = ByteTokenizer()
    read = np.array([[*source.encode(), tokenizer.eos]], np.int32)
    ids = np.array([*target.encode(), tokenizer.eos])
    inputs = np.array([[cfg.start_id, *ids[:-1]]], np.int32)
    positions = np.arange(read.shape[1], dtype=np.int32)[None]
    logits = COMPILED(tree, inputs, cfg=cfg, source=Source(read, np.ones_like(read), positions))
    logits_TV = np.asarray(logits, np.float64)[0, :, : cfg.vocabulary]
    largest = logits_TV.max(-1, keepdims=True)
    log_Z = np.log(np.exp(logits_TV - largest).sum(-1)) + largest[:, 0]
    return log_Z - logits_TV[np.arange(len(ids)), ids]


@pytest.mark.parametrize("positions", ["relative"])
def test_totals_are_those_of_each_pair_alone(store, one_device, positions):
    cfg = model(positions)
    tree, found = drawn(cfg), {}
    scores = evaluator(cfg, store, one_device)(tree, each_document=lambda d, ids, nats: found.update({d: (ids, nats)}))
    expected = [plain_nats(cfg, tree, *pair) for pair in PAIRS]
    assert scores.nats == pytest.approx(sum(each.sum() for each in expected), rel=1e-6)
    assert list(found) == list(range(len(PAIRS)))
    for (ids, nats), (_, target), alone in zip(found.values(), PAIRS, expected, strict=True):
        assert ids.tolist() == [*target.encode(), ByteTokenizer().eos]
        np.testing.assert_allclose(nats, alone, rtol=1e-4, atol=1e-4)
    assert scores.tokens == sum(len(target.encode()) + 1 for _, target in PAIRS)
    assert scores.words == sum(len(target.split()) for _, target in PAIRS)
    assert scores.bytes == sum(len(target.encode()) for _, target in PAIRS)
    assert scores.protocol["truncation"] == "none" and scores.protocol["start"] == ByteTokenizer().bos
    other = evaluator(cfg, store, one_device)(drawn(cfg) | {"encoder": jax.tree.map(lambda x: -x, tree["encoder"])})
    assert abs(other.nats - scores.nats) > 1, "what the encoder makes of a source counts"


def test_batches_and_devices_change_no_result(store, one_device):
    cfg = model()
    tree = drawn(cfg)
    expected = evaluator(cfg, store, one_device)(tree).nats
    eight, split = make_mesh(ParallelConfig()), make_mesh(ParallelConfig(fsdp=2, tensor=2))
    for batch_size, mesh in [(1, one_device), (8, one_device), (3, eight), (3, split)]:
        laid = jax.device_put(tree, parameter_shardings(mesh, language_model.model_specs(cfg), RULES))
        assert evaluator(cfg, store, mesh, batch_size=batch_size)(laid).nats == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("positions", SHAPES)
def test_a_packed_row_of_pairs_scores_as_the_pairs_alone(store, one_device, positions):
    cfg = model(positions)
    tree = drawn(cfg)
    rows = PairRows(store, Limits(128, 192, False, None), start_id=cfg.start_id, packing="best_fit")
    batch = rows.cut([0], [0], seed=0)
    assert len(rows) == 1 and batch.segments_BT.max() == len(PAIRS), "all pairs in one row"
    nll = jax.jit(functools.partial(language_model.nll, cfg=cfg, constrain=language_model.unconstrained))
    nll_BT = nll(tree, *batch[:2], *batch[3:5], source=batch.source, dropout_keys_B=None)
    together = float((nll_BT * batch.weights_BT).sum())
    assert together == pytest.approx(evaluator(cfg, store, one_device)(tree).nats, rel=1e-6)


def test_what_learned_positions_cannot_hold_is_said(store, one_device):
    cfg = model("learned", max_positions=20)
    scores = evaluator(cfg, store, one_device)(drawn(cfg))
    kept = [pair for pair in PAIRS if len(pair[1].encode()) + 1 <= 20]
    cut = sum(len(source.encode()) + 1 > 20 for source, _ in kept)
    left_out = len(PAIRS) - len(kept)
    assert scores.documents == len(kept) and cut and left_out
    assert scores.protocol["truncation"] == (
        f"to 20 positions: {cut} sources cut, {left_out} pairs with longer targets left out"
    )


def test_only_some_pairs_in_the_loop(store, one_device):
    some = evaluator(model(), store, one_device, max_tokens=20)
    assert 0 < some.tokens <= 20 + len(some.documents) and len(some.documents) < len(PAIRS)


def test_a_model_without_a_start_is_refused(store, one_device):
    cfg = RunConfig(model=ModelConfig(family="encoder_decoder", num_layers=1)).resolve(258).model
    with pytest.raises(InputError, match="no id that targets follow"):
        evaluator(cfg, store, one_device)
    with pytest.raises(InputError, match="batch_size is 0"):
        evaluator(model(), store, one_device, batch_size=0)


def test_nats_that_are_no_numbers_are_reported(store, one_device):
    cfg = model()
    broken = drawn(cfg)
    broken["norm"]["scale"] = broken["norm"]["scale"] * np.float32(np.nan)
    assert math.isnan(evaluator(cfg, store, one_device)(broken).nats)
