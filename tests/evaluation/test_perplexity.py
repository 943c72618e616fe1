"""The evaluator: each token scored once with the promised context, and the same result however it is batched."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest

from lm.config import InputError, ModelConfig, ParallelConfig, RunConfig
from lm.data.sources.document import Document
from lm.data.tokenizer import ByteTokenizer
from lm.data.tokens import tokenize
from lm.evaluation import compression
from lm.evaluation.perplexity import Evaluator, ratio_standard_error, windows
from lm.nn import language_model, params
from lm.parallel import make_mesh
from tests.data.memory_corpus import corpus_of

TEXTS = {
    "long": "the cat sat on the mat, and the dog sat on the cat " * 3,
    "one": "x",
    "empty": "",
    "wide": "žluťoučký kůň 👩‍🚀 pěl",
    "short": "a short line\n",
    "exact": "0123456789abcdef",
}


@pytest.fixture(scope="module")
def store():
    return tokenize(corpus_of(*(Document(*each) for each in TEXTS.items())), ByteTokenizer())


@pytest.fixture(scope="module")
def cfg():
    model = ModelConfig(num_layers=2, d_model=32, num_heads=2, positions="rotary", init_std=0.3)
    return RunConfig(model=model).resolve(258).model


@pytest.fixture(scope="module")
def tree(cfg):
    return params.initialize(language_model.model_specs(cfg), jax.random.key(0))


class Headless(ByteTokenizer):
    """Bytes without BOS and EOS."""

    bos = eos = None


def evaluator(cfg, store, mesh, *, window=16, stride=16, batch_size=3, tokenizer=None, **more):
    tokenizer = tokenizer or ByteTokenizer()
    return Evaluator(cfg, store, tokenizer, window=window, stride=stride, batch_size=batch_size, mesh=mesh, **more)


def one_token_at_a_time(cfg, tree, texts, window, stride, head=(256,), prompts=None):
    """The protocol as a sentence: target i is predicted from the inputs of the window that scores it, alone.

    Of each text as many bytes as `prompts` says, the first ones, are context alone.
    """

    @jax.jit
    def log_probabilities(ids_1T):
        return jax.nn.log_softmax(language_model.apply(tree, ids_1T, cfg=cfg)[0, :, :258])

    nats, count = 0.0, 0
    for text, prompt in zip(texts, prompts or [0] * len(texts), strict=True):
        ids = [*head, *text.encode()]
        done = 0
        while done < len(ids) - 1:
            new = min(window if done == 0 else stride, len(ids) - 1 - done)
            last = done + new  # index of the last target
            first = max(0, last - window)
            row = np.zeros((1, window), np.int32)
            row[0, : last - first] = ids[first:last]
            table = np.asarray(log_probabilities(row), np.float64)
            for target in range(max(done + 1, len(head) + prompt), last + 1):
                nats -= table[target - 1 - first, ids[target]]
                count += 1
            done = last
    return nats, count


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 5), (16, 1), (300, 300)])
def test_equals_a_loop_over_single_tokens(cfg, tree, store, one_device, window, stride):
    scores = evaluator(cfg, store, one_device, window=window, stride=stride)(tree)
    nats, count = one_token_at_a_time(cfg, tree, list(TEXTS.values()), window, stride)
    assert scores.tokens == count == sum(len(text.encode()) for text in TEXTS.values())
    np.testing.assert_allclose(scores.nats, nats, rtol=1e-6)
    assert scores.words == sum(len(text.split()) for text in TEXTS.values())
    assert scores.bytes == sum(len(text.encode()) for text in TEXTS.values())
    assert scores.documents == len(TEXTS) - 1, "the empty one is left out"
    assert scores.perplexity == math.exp(scores.nats / scores.tokens)
    assert scores.bits_per_byte == scores.nats / scores.bytes / math.log(2)
    assert scores.word_perplexity == math.exp(scores.nats / scores.words)
    assert scores.to_dict()["protocol"]["bos"] == 256


def test_without_bos_the_first_token_is_not_scored(cfg, tree, one_device):
    headless = Headless()
    store = tokenize(corpus_of(*TEXTS.values()), headless)
    scores = evaluator(cfg, store, one_device, tokenizer=headless)(tree)
    nats, count = one_token_at_a_time(cfg, tree, list(TEXTS.values()), 16, 16, head=())
    assert scores.tokens == count == sum(max(len(text.encode()) - 1, 0) for text in TEXTS.values())
    np.testing.assert_allclose(scores.nats, nats, rtol=1e-6)
    assert scores.protocol["bos"] is None


def test_batch_size_and_devices_change_nothing(cfg, tree, store, one_device):
    """1e-6 in mean nats, float32; eight devices, and rows that share windows in another way."""
    reference = evaluator(cfg, store, one_device, batch_size=1, stride=7)(tree)
    others = [evaluator(cfg, store, one_device, batch_size=64, stride=7)(tree)]
    others += [evaluator(cfg, store, make_mesh(ParallelConfig(fsdp=2)), batch_size=5, stride=7)(tree)]
    for scores in others:
        assert scores.tokens == reference.tokens
        assert abs(scores.nats_per_token - reference.nats_per_token) < 1e-6
        assert abs(scores.standard_error - reference.standard_error) < 1e-6


def test_no_document_sees_another(cfg, tree, one_device):
    """Documents share rows; each one's nats must be what they are alone."""
    texts = [TEXTS["short"], TEXTS["wide"]]

    def nats(names):
        store = tokenize(corpus_of(*(texts[n] for n in names)), ByteTokenizer())
        return evaluator(cfg, store, one_device, window=200, stride=200)(tree).nats

    np.testing.assert_allclose(nats([0, 1]), nats([0]) + nats([1]), rtol=1e-6)


@pytest.mark.parametrize("length", [0, 1, 2, 5, 16, 17, 18, 40, 41, 100])
@pytest.mark.parametrize("stride", [1, 3, 16])
def test_windows_are_the_rolling_windows_of_the_harness(length, stride):
    """Each target once, in order; never more than 16 inputs; at least 16 - stride + 1 ids before it where there are."""
    found = list(windows(length, window=16, stride=stride))
    scored = [i for w in found for i in range(w.end - w.scored + 1, w.end + 1)]
    assert scored == list(range(1, length))
    for number, w in enumerate(found):
        assert 0 <= w.begin < w.end <= w.begin + 16
        assert number == 0 or w.end - w.begin == 16
        for target in range(w.end - w.scored + 1, w.end + 1):
            assert target - w.begin >= min(16 - stride + 1, target)


def test_standard_error_is_the_ratio_estimator():
    nats, tokens = np.array([10.0, 40.0, 7.0]), np.array([5, 10, 4])
    ratio = 57 / 19
    residual = nats - ratio * tokens
    wanted = math.sqrt(3 * (residual @ residual) / 2) / 19
    np.testing.assert_allclose(ratio_standard_error(nats, tokens), wanted)
    assert ratio_standard_error(nats[:1], tokens[:1]) is None


def test_standard_error_covers_the_truth():
    """Over many draws of 40 documents, the true mean lies within two standard errors about 95 % of the time."""
    draw, hits = np.random.default_rng(0), 0
    for _ in range(400):
        tokens = draw.integers(50, 500, 40)
        nats = tokens * (3 + draw.normal(0, 0.4, 40))
        hits += abs(nats.sum() / tokens.sum() - 3) < 2 * ratio_standard_error(nats, tokens)
    assert 0.91 < hits / 400 < 0.98


def test_max_tokens_takes_the_same_documents_always(cfg, tree, store, one_device):
    some = evaluator(cfg, store, one_device, max_tokens=60)
    assert 0 < len(some.documents) < len(TEXTS)
    assert sum(len(store.document(i)) for i in some.documents) <= 60
    assert some.documents == evaluator(cfg, store, one_device, max_tokens=60).documents
    assert len(evaluator(cfg, store, one_device, max_tokens=1).documents) == 1, "at least one"


@pytest.mark.parametrize(("window", "stride"), [(16, 17), (16, 0), (0, 0)])
def test_impossible_windows_are_refused(cfg, store, one_device, window, stride):
    with pytest.raises(InputError, match="stride"):
        evaluator(cfg, store, one_device, window=window, stride=stride)


def test_window_past_learned_positions_is_refused(cfg, store, one_device):
    learned = dataclasses.replace(cfg, positions="learned", max_positions=8)
    with pytest.raises(InputError, match="16 is more than the model's 8 learned positions"):
        evaluator(learned, store, one_device)


@pytest.mark.parametrize("kind", [ByteTokenizer, Headless])
@pytest.mark.parametrize(("window", "stride"), [(300, 300), (16, 16), (16, 5)])
def test_prompts_are_context_alone(cfg, tree, one_device, kind, window, stride):
    pairs = [
        Document("a", "wide žluťoučký", "a prompt, "),
        Document("b", "no prompt"),
        Document("c", "y", "long " * 20),
    ]
    texts, prompts = [each.prompt + each.text for each in pairs], [len(each.prompt) for each in pairs]
    store, head = tokenize(corpus_of(*pairs), kind()), () if kind is Headless else (256,)
    how = {"window": window, "stride": stride, "tokenizer": kind()}
    evaluators = [evaluator(cfg, store, one_device, score_prompts=scored, **how) for scored in (False, True)]
    for each, skipped, words, size in zip(evaluators, (prompts, None), (5, 27), (28, 138), strict=True):
        scores = each(tree)
        nats, count = one_token_at_a_time(cfg, tree, texts, window, stride, head, skipped)
        assert each.tokens == scores.tokens == count
        np.testing.assert_allclose(scores.nats, nats, rtol=1e-6)
        assert (scores.words, scores.bytes) == (words, size)
    assert [each.protocol["prompts"] for each in evaluators] == ["context", "scored"]


def test_nothing_to_score_is_said(cfg, tree, one_device):
    store = tokenize(corpus_of("x"), Headless())
    with pytest.raises(InputError, match="nothing to score"):
        evaluator(cfg, store, one_device, tokenizer=Headless())(tree)


def test_compressors():
    bits = compression.bits_per_byte(["a" * 10_000])
    assert 0 < bits["gzip -9"] < 0.1 and 0 < bits["xz"] < 0.2
    assert compression.bits_per_byte([]) == {}
