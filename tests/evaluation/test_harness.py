"""lm-evaluation-harness over our parameters: its numbers are ours, by its own windows and on a task of its own."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when they are imported
pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402

from lm import generation  # noqa: E402
from lm.checkpoint import Loaded  # noqa: E402
from lm.config import InputError, ModelConfig, ParallelConfig, RunConfig  # noqa: E402
from lm.data.tokenizer import ByteTokenizer  # noqa: E402
from lm.data.tokens import tokenize  # noqa: E402
from lm.evaluation import harness  # noqa: E402
from lm.evaluation.perplexity import Evaluator  # noqa: E402
from lm.nn import language_model, params  # noqa: E402
from lm.parallel import make_mesh  # noqa: E402
from lm.sampling import Sampling  # noqa: E402
from tests.data.memory_corpus import corpus_of  # noqa: E402

WINDOW = 16
TEXTS = ["the cat sat on the mat, and the dog", "x", "0123456789abcdef", "0123456789abcdefg", "žluťoučký 👩‍🚀"]


@pytest.fixture(scope="module")
def run():
    model = ModelConfig(num_layers=1, d_model=32, num_heads=2, positions="rotary", init_std=0.3)
    config = RunConfig(model=model).resolve(258)
    tree = params.initialize(language_model.model_specs(config.model), jax.random.key(0))
    return Loaded(config, tree, ByteTokenizer(), 7, Path("run"))


@pytest.fixture(scope="module")
def model(run):
    return harness.HarnessModel(run, window=WINDOW, batch_size=3, mesh=make_mesh(ParallelConfig(), jax.devices()[:1]))


@pytest.fixture(scope="module")
def table(run):
    """Log-probabilities [T, V] of ids alone in a row, float64."""
    forward = jax.jit(functools.partial(language_model.apply, cfg=run.config.model))

    def of(ids):
        row = np.zeros((1, 2 * WINDOW), np.int32)
        row[0, : len(ids)] = ids
        logits = np.asarray(forward(run.params, row)[0, : len(ids), :258], np.float64)
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    return of


def asked(kind, *arguments):
    return [Instance(kind, {}, each, 0) for each in arguments]


def test_rolling_is_the_evaluator_and_the_harnesses_own_windows(run, model, table, one_device):
    found = model.loglikelihood_rolling(asked("loglikelihood_rolling", *((text,) for text in TEXTS)))
    store = tokenize(corpus_of(*TEXTS), ByteTokenizer())
    evaluator = Evaluator(
        run.config.model, store, ByteTokenizer(), window=WINDOW, stride=WINDOW, batch_size=2, mesh=one_device
    )
    np.testing.assert_allclose(-np.array(found), evaluator(run.params).per_document.nats_D, rtol=1e-6)

    def by_their_windows(text):
        log_probability = 0.0
        for pair in get_rolling_token_windows(list(text.encode()), 256, WINDOW, context_len=1):
            context, targets = make_disjoint_window(pair)
            rows = table([*context, *targets][:-1])[-len(targets) :]
            log_probability += sum(rows[i, target] for i, target in enumerate(targets))
        return log_probability

    np.testing.assert_allclose(found, [by_their_windows(text) for text in TEXTS], rtol=1e-6)


def test_continuations(model, table):
    """Each alone: the continuation's log-likelihood after BOS and context, and whether it is the greedy one."""
    greedy = model.generate_until(asked("generate_until", ("the cat", {"max_gen_toks": 3})))[0]
    pairs = [("the cat", " sat"), ("the cat", greedy), ("", "on"), ("spaces  ", "x"), ("a long context, cut ", "off")]
    found = model.loglikelihood(asked("loglikelihood", *pairs))
    for (context, continuation), (log_probability, is_greedy) in zip(pairs, found, strict=True):
        ids = [256, *(context + continuation).encode()][-WINDOW - 1 :]
        scored = len(continuation.encode()) + len(context) - len(context.rstrip())
        rows, targets = table(ids[:-1])[-scored:], ids[-scored:]
        assert log_probability == pytest.approx(sum(rows[i, t] for i, t in enumerate(targets)), rel=1e-6)
        assert is_greedy == (rows.argmax(axis=-1).tolist() == targets)
    assert [is_greedy for _, is_greedy in found][1], "what greedy decoding writes is greedy"
    again = [model.loglikelihood(asked("loglikelihood", pair))[0][0] for pair in pairs]
    np.testing.assert_allclose([one for one, _ in found], again, rtol=1e-6)


def test_writing_is_generation_cut_at_until(run, model):
    contexts = ["ab", "the cat", "x", "on the mat", "dog"]
    written = model.generate_until(asked("generate_until", *((text, {"max_gen_toks": 6}) for text in contexts)))
    expected = generation.generate(
        run.params, run.config.model, run.tokenizer, contexts, max_tokens=6, sampling=Sampling(0.0), seed=0
    )
    assert written == expected and any(expected)
    longest = max(written, key=len)
    stop, context = longest[1], contexts[written.index(longest)]
    for until in (stop, ["", stop]):
        (cut,) = model.generate_until(asked("generate_until", (context, {"until": until, "max_gen_toks": 6})))
        assert cut == longest.split(stop)[0]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with three task files over local data."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"q": "the cat sat", "choices": [" on the mat", " zzqq"], "label": 0, "text": TEXTS[0]},
        {"q": "the dog", "choices": ["", " sat"], "label": 1, "text": TEXTS[3]},
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    kinds = {
        "choice": 'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\n'
        'doc_to_target: "{{label}}"\nmetric_list:\n  - metric: acc\n',
        "rolling": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: word_perplexity\n  - metric: bits_per_byte\n",
        "write": 'output_type: generate_until\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{text}}"\n'
        'generation_kwargs: {until: ["."], max_gen_toks: 4}\nmetric_list:\n  - metric: exact_match\n',
    }
    data = f"dataset_path: json\ndataset_kwargs:\n  data_files: {{test: {folder}/data.jsonl}}\ntest_split: test\n"
    for name, rest in kinds.items():
        (folder / f"{name}.yaml").write_text(f"task: own_{name}\n{data}{rest}", encoding="utf-8")
    return folder


def test_tasks_of_your_own(model, tasks, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    found = harness.evaluate(model, ["own_rolling", "own_write"], str(tasks))
    texts = [TEXTS[0], TEXTS[3]]
    nats = -sum(model.loglikelihood_rolling(asked("loglikelihood_rolling", *((text,) for text in texts))))
    expected = nats / sum(len(text.encode()) for text in texts) / np.log(2)
    assert found["results"]["own_rolling"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-9)
    assert found["results"]["own_write"]["exact_match,none"] == 0.0
    assert "own_rolling" in harness.table(found)
    json.dumps(found, allow_nan=False)


def test_a_task_that_is_not_there(model, tasks):
    with pytest.raises(InputError, match=r"no task 'own_choise' \(did you mean 'own_choice'\?\)"):
        harness.evaluate(model, ["own_choise"], str(tasks))
