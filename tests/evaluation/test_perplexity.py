"""The evaluator: each token scored once with the promised context, and the same result however it is batched."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import threading

import jax
import numpy as np
import pytest

from lm.config import InputError, ModelConfig, ParallelConfig, RunConfig
from lm.data.sources.document import Document
from lm.data.tokenizer import ByteTokenizer
from lm.data.tokens import tokenize
from lm.evaluation import compression, scorer
from lm.evaluation.perplexity import Evaluator, ratio_standard_error
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
    "one more": "0123456789abcdefg",
    "window of 8": "01234567",
    "one more than 8": "012345678",
    "smile": "😀",
    "chinese": "猫坐在垫子上。狗也是。",
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


@functools.cache
def forward(cfg):
    return jax.jit(functools.partial(language_model.apply, cfg=cfg))


def one_token_at_a_time(cfg, tree, texts, window, stride, head=(256,), prompts=None, tail=()):
    """The protocol as a sentence: target i is predicted from the inputs of the window that scores it, alone.

    Of each text as many bytes as `prompts` says, the first ones, are context alone. Softmax and sums are NumPy's, in
    float64. Gives the nats of every scored target, a list a text.
    """
    width, found = 16 if window <= 16 else 300, []  # causal: what is behind a row's inputs changes nothing
    for text, prompt in zip(texts, prompts or [0] * len(texts), strict=True):
        ids, nats = [*head, *text.encode(), *tail], []
        done = 0
        while done < len(ids) - 1:
            new = min(window if done == 0 else stride, len(ids) - 1 - done)
            last = done + new  # index of the last target
            first = max(0, last - window)
            row = np.zeros((1, width), np.int32)
            row[0, : last - first] = ids[first:last]
            logits_TV = np.asarray(forward(cfg)(tree, row)[0, :, :258], np.float64)
            for target in range(max(done + 1, len(head) + prompt), last + 1):
                logits_V = logits_TV[target - 1 - first]
                highest = logits_V.max()
                nats.append(highest + np.log(np.exp(logits_V - highest).sum()) - logits_V[ids[target]])
            done = last
        found.append(nats)
    return found


def total(nats):
    return math.fsum(sum(nats, [])), sum(map(len, nats))


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 4), (8, 1), (16, 16), (16, 5), (300, 300)])
def test_equals_a_loop_over_single_tokens(cfg, tree, store, one_device, window, stride):
    tokens = {}
    each = evaluator(cfg, store, one_device, window=window, stride=stride)
    scores = each(tree, each_document=lambda number, ids, nats: tokens.setdefault(number, (ids, nats)))
    texts = [text for text in TEXTS.values() if text]
    expected = one_token_at_a_time(cfg, tree, texts, window, stride)
    nats, count = total(expected)
    assert scores.tokens == count == sum(len(text.encode()) for text in texts)
    np.testing.assert_allclose(scores.nats, nats, rtol=1e-6)
    for number, (text, wanted) in enumerate(zip(texts, expected, strict=True)):
        np.testing.assert_array_equal(tokens[number][0], list(text.encode()))
        np.testing.assert_allclose(tokens[number][1], wanted, rtol=2e-5)
        np.testing.assert_allclose(scores.per_document.nats_D[number], sum(wanted), rtol=2e-6)
    assert list(tokens) == sorted(tokens), "documents come in order"
    assert scores.words == sum(len(text.split()) for text in texts)
    assert scores.bytes == sum(len(text.encode()) for text in texts)
    assert scores.documents == len(texts), "the empty one is left out"
    assert scores.perplexity == math.exp(scores.nats / scores.tokens)
    assert scores.bits_per_byte == scores.nats / scores.bytes / math.log(2)
    assert scores.word_perplexity == math.exp(scores.nats / scores.words)
    assert scores.to_dict()["protocol"]["bos"] == 256 and scores.to_dict()["protocol"]["eos"] is False


def test_documents_add_up_to_the_totals(cfg, tree, store, one_device):
    scores = evaluator(cfg, store, one_device)(tree)
    records = list(scores.per_document.records())
    assert [record["id"] for record in records] == [name for name, text in TEXTS.items() if text]
    assert math.fsum(record["nats"] for record in records) == scores.nats
    for name in ("tokens", "words", "bytes"):
        assert sum(record[name] for record in records) == getattr(scores, name)


def test_eos_is_scored_where_that_is_asked_for(cfg, tree, store, one_device):
    scores = evaluator(cfg, store, one_device, score_eos=True)(tree)
    nats, count = total(one_token_at_a_time(cfg, tree, [t for t in TEXTS.values() if t], 16, 16, tail=(257,)))
    assert scores.tokens == count == scores.bytes + scores.documents
    np.testing.assert_allclose(scores.nats, nats, rtol=1e-6)
    assert scores.protocol["eos"] == 257
    with pytest.raises(InputError, match="no EOS to score"):
        evaluator(cfg, store, one_device, tokenizer=Headless(), score_eos=True)


def test_weights_that_are_no_numbers_give_null(cfg, tree, store, one_device):
    broken = jax.tree.map(lambda x: x * np.nan, tree)
    scores = evaluator(cfg, store, one_device)(broken)
    result = scores.to_dict()
    for name in ("nats", "nats_per_token", "perplexity", "word_perplexity", "bits_per_byte", "standard_error"):
        assert result[name] is None, name
    assert result["tokens"] == sum(len(text.encode()) for text in TEXTS.values())
    assert all(record["nats"] is None for record in scores.per_document.records())


def test_without_bos_the_first_token_is_not_scored(cfg, tree, one_device):
    headless = Headless()
    store = tokenize(corpus_of(*TEXTS.values()), headless)
    scores = evaluator(cfg, store, one_device, tokenizer=headless)(tree)
    nats, count = total(one_token_at_a_time(cfg, tree, list(TEXTS.values()), 16, 16, head=()))
    assert scores.tokens == count == sum(max(len(text.encode()) - 1, 0) for text in TEXTS.values())
    np.testing.assert_allclose(scores.nats, nats, rtol=1e-6)
    assert scores.protocol["bos"] is None


def test_batch_size_and_devices_change_nothing(cfg, tree, store, one_device):
    """1e-6 in mean nats, float32; eight devices, and rows that share windows in another way."""
    reference = evaluator(cfg, store, one_device, batch_size=1, stride=7)(tree)
    others = [evaluator(cfg, store, one_device, batch_size=size, stride=7)(tree) for size in (3, 8)]
    others += [evaluator(cfg, store, make_mesh(ParallelConfig(fsdp=2)), batch_size=5, stride=7)(tree)]
    for scores in others:
        assert scores.tokens == reference.tokens
        assert abs(scores.nats_per_token - reference.nats_per_token) < 1e-6
        assert abs(scores.standard_error - reference.standard_error) < 1e-6
        np.testing.assert_allclose(scores.per_document.nats_D, reference.per_document.nats_D, rtol=1e-5)


class Waiting:
    """An array that isn't there before `until` is set, and sets `then` as soon as it is asked for."""

    def __init__(self, array, until, then):
        self.array, self.shape, self.until, self.then = array, array.shape, until, then

    def __array__(self, dtype=None, copy=None):
        if self.then is not None:
            self.then.set()
        assert self.until is None or self.until.wait(30), "the next batch was not computed meanwhile"
        return np.asarray(self.array, dtype)


def test_a_cpu_computes_the_next_batch_meanwhile_and_gives_both_in_order(cfg, tree, store, one_device, monkeypatch):
    """The first batch is ready only once the second has been asked for."""
    how = {"window": 16, "stride": 16, "batch_size": 1}
    expected = evaluator(cfg, store, one_device, **how)(tree)
    real, asked, second = scorer._compiled, itertools.count(), threading.Event()

    def compiled(*arguments):
        def run(*batch):
            number = next(asked)
            until, then = second if number == 0 else None, second if number == 1 else None
            return tuple(Waiting(array, until, then) for array in real(*arguments)(*batch))

        return run

    monkeypatch.setattr(scorer, "_compiled", compiled)
    found = evaluator(cfg, store, one_device, **how)(tree)
    assert next(asked) > 2
    assert found.nats == expected.nats
    np.testing.assert_array_equal(found.per_document.nats_D, expected.per_document.nats_D)


def test_a_batch_that_its_thread_computes_holds_no_other_back(cfg, tree, store, one_device, monkeypatch):
    """The call for the second batch returns only once the third has been asked for."""
    real, asked, third = scorer._compiled, itertools.count(), threading.Event()

    def compiled(*arguments):
        def run(*batch):
            number = next(asked)
            if number == 2:
                third.set()
            assert number != 1 or third.wait(20), "the third was not begun meanwhile"
            return real(*arguments)(*batch)

        return run

    monkeypatch.setattr(scorer, "_compiled", compiled)
    evaluator(cfg, store, one_device, batch_size=1)(tree)
    assert third.is_set()


def test_no_batch_copies_the_layers_out_of_their_stack(cfg, store, one_device, monkeypatch):
    """What a batch needs besides its arguments is less than the layers."""
    cfg = dataclasses.replace(cfg, num_layers=8, d_model=128)
    tree = params.initialize(language_model.model_specs(cfg), jax.random.key(0))
    layers = sum(leaf.nbytes for leaf in jax.tree.leaves(tree["layers"]))
    real, needed = scorer._compiled, []

    def compiled(*arguments):
        def run(given, *batch):
            program = real(*arguments)
            compiled = [program.lower(weights, *batch).compile() for weights in (given, tree)]
            needed.append([each.memory_analysis().temp_size_in_bytes for each in compiled])
            return program(given, *batch)

        return run

    monkeypatch.setattr(scorer, "_compiled", compiled)
    evaluator(cfg, store, one_device, batch_size=1)(tree)
    for apart, stacked in needed:
        assert apart < layers / 4 < layers <= stacked


def test_no_document_sees_another(cfg, tree, one_device):
    """Documents share rows; each one's nats must be what they are alone."""
    texts = [TEXTS["short"], TEXTS["wide"]]

    def nats(names):
        store = tokenize(corpus_of(*(texts[n] for n in names)), ByteTokenizer())
        return evaluator(cfg, store, one_device, window=200, stride=200)(tree).nats

    np.testing.assert_allclose(nats([0, 1]), nats([0]) + nats([1]), rtol=1e-6)


def test_standard_error_is_the_ratio_estimator():
    nats, tokens = np.array([10.0, 40.0, 7.0]), np.array([5, 10, 4])
    ratio = 57 / 19
    residual = nats - ratio * tokens
    wanted = math.sqrt(3 * (residual @ residual) / 2) / 19
    np.testing.assert_allclose(ratio_standard_error(nats, tokens), wanted)
    assert ratio_standard_error(nats[:1], tokens[:1]) is None
    nothing = (np.array([0.0, 10.0]), np.array([0, 5]))  # a document without a scored token says nothing of the spread
    assert ratio_standard_error(*nothing) is None
    np.testing.assert_allclose(ratio_standard_error(np.append(nats, 0.0), np.append(tokens, 0)), wanted)


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


@pytest.mark.parametrize(
    ("window", "stride", "named"), [(16, 17, "stride 17"), (16, 0, "stride 0"), (0, 0, "window 0")]
)
def test_impossible_windows_are_refused(cfg, store, one_device, window, stride, named):
    with pytest.raises(InputError, match=named):
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
        nats, count = total(one_token_at_a_time(cfg, tree, texts, window, stride, head, skipped))
        assert each.tokens == scores.tokens == count
        np.testing.assert_allclose(scores.nats, nats, rtol=1e-6)
        assert (scores.words, scores.bytes) == (words, size)
    assert [each.protocol["prompts"] for each in evaluators] == ["context", "scored"]


def test_nothing_to_score_is_said_before_anything_is(cfg, one_device):
    store = tokenize(corpus_of("x"), Headless())
    with pytest.raises(InputError, match="nothing to score in memory"):
        evaluator(cfg, store, one_device, tokenizer=Headless())


def test_compressors():
    bits = compression.bits_per_byte(["a" * 10_000])
    assert 0 < bits["gzip -9"] < 0.1 and 0 < bits["xz"] < 0.2
    assert compression.bits_per_byte([]) == {}
