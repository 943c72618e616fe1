"""Translation and summarisation: the metrics are those of the field's packages, their confidence is what it says, and
what is scored is what the model wrote."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import random
from pathlib import Path

import jax
import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF

from lm import generation
from lm.beams import Search
from lm.checkpoint import Loaded
from lm.config import InputError, ModelConfig, RunConfig
from lm.data.corpus import open_corpus
from lm.data.tokenizer import ByteTokenizer
from lm.evaluation import tasks, writing
from lm.evaluation.bleu import translation_scores
from lm.evaluation.bootstrap import interval
from lm.evaluation.rouge import NAMES, lead_sentence, summary_scores
from lm.evaluation.tasks import TaskEvaluator, pairs_of
from lm.evaluation.writing import Decoding
from lm.nn import language_model, params
from lm.token_generation import search_ids

WORDS = ["le", "chat", "noir", "dort", "sur", "la", "chaise", "et", "voit", "que", "pluie", "tombe", "dehors", "midi"]


def some_texts(count, seed=0):
    choose = random.Random(seed)
    return [" ".join(choose.choices(WORDS, k=choose.randint(4, 15))) + "." for _ in range(count)]


def worse(texts, seed=1):
    choose = random.Random(seed)
    return [" ".join(word for word in text.split() if choose.random() < 0.8) for text in texts]


def test_bleu_and_chrf_are_sacrebleus():
    references = some_texts(200)
    predictions = worse(references)
    for measured, metric in zip(
        translation_scores(predictions, [[text] for text in references]), (BLEU(), CHRF()), strict=True
    ):
        score = metric.corpus_score(predictions, [references])
        assert measured.value == score.score
        assert measured.signature == str(metric.get_signature())
        bootstrapped = metric.corpus_score(predictions, [references], n_bootstrap=1000)
        low, high = measured.interval
        assert low < measured.value < high
        # Other draws than sacrebleu's: the width of an interval of 1000 resamples is known to a tenth.
        assert (high - low) / 2 == pytest.approx(bootstrapped._ci, rel=0.15)


def test_several_references_and_documents_with_fewer():
    first, second = some_texts(40), some_texts(40, seed=5)
    predictions = worse(second)
    both = translation_scores(predictions, list(zip(first, second, strict=True)))
    assert both[0].value == BLEU().corpus_score(predictions, [first, second]).score
    assert "nrefs:2" in both[0].signature
    some = [[one] if i % 2 else [one, two] for i, (one, two) in enumerate(zip(first, second, strict=True))]
    fewer = translation_scores(predictions, some)
    assert "nrefs:var" in fewer[0].signature
    assert translation_scores(predictions, [[one] for one in first])[0].value < fewer[0].value < both[0].value


def test_rouge_is_rouge_scores():
    from rouge_score.rouge_scorer import RougeScorer

    first, second = some_texts(30), some_texts(30, seed=5)
    predictions = [text.replace("chat", "chats") for text in worse(second)]  # for the stemmer
    scorer = RougeScorer(NAMES, use_stemmer=True)
    best = dict.fromkeys(NAMES, 0.0)
    for prediction, *references in zip(predictions, first, second, strict=True):
        for name in NAMES:
            best[name] += max(scorer.score(one, prediction)[name].fmeasure for one in references)
    measured = summary_scores(predictions, list(zip(first, second, strict=True)))
    assert [each.name for each in measured] == list(NAMES)
    for each in measured:
        assert each.value == pytest.approx(100 * best[each.name] / 30, rel=1e-12)
        assert each.interval.low < each.value < each.interval.high


@pytest.mark.parametrize("scores", [translation_scores, summary_scores])
def test_perfect_and_worthless_predictions(scores):
    references = [[text] for text in some_texts(20)]
    for each in scores([text for [text] in references], references):
        assert each.value == pytest.approx(100) and each.interval == pytest.approx((100, 100))
    for each in scores([""] * 20, references):
        assert each.value == 0 and each.interval == (0, 0)


def test_an_interval_shrinks_with_the_root_of_the_documents():
    values = np.random.default_rng(0).normal(50, 10, 6400)
    widths = []
    for size in (100, 1600, 6400):
        some = values[:size]
        low, high = interval(some[:, None], lambda sums_K, size=size: sums_K[0] / size)
        assert low < some.mean() < high
        widths.append(high - low)
        # The mean of many numbers is normal, so what the interval should be is known: to a tenth by 1000 resamples.
        assert widths[-1] == pytest.approx(2 * 1.96 * some.std() / size**0.5, rel=0.1)
    assert widths == sorted(widths, reverse=True)
    assert interval(values[:1, None], lambda sums_K: sums_K[0]) is None


def test_the_first_sentence():
    assert lead_sentence("We study x. Then y.") == "We study x."
    assert lead_sentence("As Smith et al. (2018) and J. Doe do, e.g. Foo, it is 3.5 times. More") == (
        "As Smith et al. (2018) and J. Doe do, e.g. Foo, it is 3.5 times."
    )
    assert lead_sentence('"Is it so?" "Yes."') == '"Is it so?"'
    assert lead_sentence("a title\nand a text") == "a title"
    assert lead_sentence("no end") == "no end"


def model_of(**fields):
    """With random weights, of bytes."""
    model = ModelConfig(num_layers=1, d_model=32, num_heads=2, init_std=0.3, **fields)
    tokenizer = ByteTokenizer()
    config = RunConfig(model=model).resolve(tokenizer.vocab_size, None, tokenizer.first_id)
    tree = params.initialize(language_model.model_specs(config.model), jax.random.key(0))
    return Loaded(config, tree, tokenizer, 7, Path("run"))


@pytest.fixture(scope="module")
def run():
    return model_of(positions="rotary")


@pytest.fixture(scope="module")
def encoder_decoder():
    return model_of(family="encoder_decoder", positions="relative")


@pytest.fixture
def pairs(tmp_path):
    lines = [f"{source}\t{target}" for source, target in zip(some_texts(9), some_texts(9, seed=3), strict=True)]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return open_corpus(f"pairs:{tmp_path}/pairs.tsv")


def test_a_sample_of_pairs_is_by_hash_and_keeps_their_order(pairs):
    every = pairs_of(pairs, "\n")
    assert [pair.source for pair in every] == some_texts(9)
    assert [pair.references for pair in every] == [(text,) for text in some_texts(9, seed=3)]
    some = pairs_of(pairs, "\n", 4)
    numbers = [every.index(pair) for pair in some]
    assert numbers == sorted(numbers) != list(range(4))
    assert set(some) < set(pairs_of(pairs, "\n", 5))
    assert pairs_of(pairs, "\n", 50) == every


def test_pairs_of_two_empty_sides_are_left_out_as_in_training(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\nthree\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("un\n \ntrois\n", encoding="utf-8")
    found = pairs_of(open_corpus(f"pairs:{tmp_path}/a.txt,{tmp_path}/b.txt"), "\n")
    assert [(pair.source, *pair.references) for pair in found] == [("one", "un"), ("three", "trois")]
    (tmp_path / "empty.txt").write_text("\n\n", encoding="utf-8")
    with pytest.raises(InputError, match="all its 2 documents are empty"):
        pairs_of(open_corpus(f"pairs:{tmp_path}/empty.txt,{tmp_path}/empty.txt"), "\n")


@pytest.mark.parametrize(("family", "beams"), [("run", 1), ("encoder_decoder", 3)])
def test_what_is_written_depends_on_no_other_pair_and_no_batch(family, beams, pairs, request):
    run = request.getfixturevalue(family)
    sources = [pair.source for pair in pairs_of(pairs, "\n")]
    told = []
    together = writing.predict(run, sources, Decoding(12, beams, batch_size=4), lambda *done: told.append(done))
    assert len({each.text for each in together}) > 3
    for number in (0, 8):
        assert writing.predict(run, [sources[number]], Decoding(12, beams, batch_size=1)) == [together[number]]
    assert told == [(4, 9), (8, 9), (9, 9)]


def test_a_search_of_beams_is_generations_own(encoder_decoder, pairs, monkeypatch):
    run, asked = encoder_decoder, []
    sources, cfg = [pair.source for pair in pairs_of(pairs, "\n")][:4], run.config.model
    several = search_ids(
        run.params, cfg, writing.prompts_of(run, sources), Search(4), max_tokens=10, end_id=run.tokenizer.eos
    )
    searched = writing.predict(run, sources, Decoding(10, 4, batch_size=4))
    assert [each.text for each in searched] == [run.tokenizer.decode(best.ids).strip() for best, *_ in several]
    assert searched != writing.predict(run, sources, Decoding(10, batch_size=4))

    def asking(params, cfg, prompts, **how):
        asked.append(how)
        return [np.zeros(0, np.int32) for _ in prompts]

    monkeypatch.setattr(writing, "generate_ids", asking)
    for decoding in (Decoding(10), Decoding(10, 4), Decoding(11, 5, 0.6)):
        writing.predict(run, sources, decoding)
    assert [(how["max_tokens"], how.get("num_beams"), how.get("length_penalty")) for how in asked] == [
        (10, None, None), (10, 4, 1.0), (11, 5, 0.6)
    ]  # fmt: skip
    assert {how["end_id"] for how in asked} == {run.tokenizer.eos}


def test_an_encoder_reads_the_source_with_eos_cut_as_it_was_trained(encoder_decoder):
    tokenizer, config = encoder_decoder.tokenizer, encoder_decoder.config
    [whole] = writing.prompts_of(encoder_decoder, ["abcdef"])
    assert whole.tolist() == [*tokenizer.encode("abcdef"), tokenizer.eos]
    cut = dataclasses.replace(config, data=dataclasses.replace(config.data, source_context=5))
    written = writing.predict(dataclasses.replace(encoder_decoder, config=cut), ["abcde", "abcd"], Decoding(4))
    assert [each.cut for each in written] == [True, False]
    short = dataclasses.replace(
        encoder_decoder, config=dataclasses.replace(config, data=dataclasses.replace(config.data, source_context=4))
    )
    assert writing.prompts_of(short, ["abcdef", "ab"])[0].tolist() == [*tokenizer.encode("abc"), tokenizer.eos]
    for step in (None, 0):  # what another library trained was not cut here, imported or read where it lies
        elsewhere = dataclasses.replace(short, step=step)
        assert writing.prompts_of(elsewhere, ["abcdef"])[0].tolist() == whole.tolist()


def test_a_source_without_eos_is_cut_to_its_beginning():
    assert generation.shortened(np.arange(9), 4, eos=8).tolist() == [0, 1, 2, 8]
    assert generation.shortened(np.arange(9), 4, eos=None).tolist() == [0, 1, 2, 3]
    assert generation.shortened(np.arange(4), 4, eos=3).tolist() == [0, 1, 2, 3]


def test_an_encoder_reads_by_its_own_tokenizer(encoder_decoder):
    class Shifted(ByteTokenizer):
        def encode(self, text):
            return super().encode(text) + 1

    own = dataclasses.replace(encoder_decoder, source_tokenizer=Shifted())
    [ids] = writing.prompts_of(own, ["abc"])
    assert ids.tolist() == [*(own.tokenizer.encode("abc") + 1), own.tokenizer.eos]


def test_a_decoder_only_model_goes_on_after_source_and_separator(run):
    config = dataclasses.replace(run.config, data=dataclasses.replace(run.config.data, pair_separator=" => "))
    [prompt] = writing.prompts_of(dataclasses.replace(run, config=config), ["ab"])
    assert prompt.tolist() == [run.tokenizer.first_id, *run.tokenizer.encode("ab => ")]


def test_a_decoder_only_model_reads_the_beginning_of_a_source_beyond_its_context(run):
    model = dataclasses.replace(run.config.model, positions="rotary", max_positions=9)
    data = dataclasses.replace(run.config.data, pair_separator="=>")
    short = dataclasses.replace(run, config=dataclasses.replace(run.config, model=model, data=data))
    prompts, cut = writing._read(short, ["abcdefghij", "abcdef"])
    first, encode = run.tokenizer.first_id, run.tokenizer.encode
    assert [ids.tolist() for ids in prompts] == [[first, *encode(text + "=>")] for text in ("abcdef", "abcdef")]
    assert cut == [True, False]


def test_the_scores_are_of_what_was_written_for_that_very_pair(run, pairs, monkeypatch):
    """The model writes its source backwards, whole up to max_tokens, and the batches go by length."""

    def backwards(params, cfg, prompts, *, max_tokens, **_):
        return [prompt[:0:-1][1:][:max_tokens] for prompt in prompts]

    monkeypatch.setattr(writing, "generate_ids", backwards)
    evaluator = TaskEvaluator("translation", pairs, Decoding(50, batch_size=4), pair_separator="\n")
    scores = evaluator(run)
    predictions = [record["prediction"] for record in scores.records()]
    assert predictions == [text[::-1][:50].strip() for text in some_texts(9)]
    result = scores.to_dict()
    references = [some_texts(9, seed=3)]
    assert result["metrics"]["chrf"] == CHRF().corpus_score(predictions, references).score > 10
    assert scores.metrics() == {f"eval/{name}": value for name, value in result["metrics"].items()}
    assert result["documents"] == result["references"] == 9
    lengths = [len(text) for text in some_texts(9)]
    assert result["unfinished"] == sum(length >= 50 for length in lengths) > 0
    assert result["tokens"] == sum(min(length, 50) for length in lengths)
    assert len(result["examples"]) == tasks.EXAMPLES and result["examples"][0] in list(scores.records())
    assert "lead_sentence" not in result


def test_the_protocol_says_how_texts_are_written(pairs):
    """The length penalty that is used too, and nothing that changes no text."""
    found = [
        TaskEvaluator("translation", pairs, decoding, pair_separator="\n").protocol
        for decoding in (Decoding(5), Decoding(5, 4), Decoding(5, 4, 0.6))
    ]
    said = [(protocol["max_tokens"], protocol["num_beams"], protocol["length_penalty"]) for protocol in found]
    assert said == [(5, 1, None), (5, 4, 1.0), (5, 4, 0.6)]
    assert not any("batch_size" in protocol for protocol in found)


def test_summaries_stand_beside_first_sentences(run, tmp_path):
    pairs = [{"of": "It rains. The cat sleeps.", "is": ["Snow", "It rains."]}, {"of": "We go. Yes.", "is": "Yes."}]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    text = open_corpus(f"pairs:jsonl:{tmp_path}/long.jsonl#of,is")
    result = TaskEvaluator("summarization", text, Decoding(4), pair_separator="\n")(run).to_dict()
    assert result["lead_sentence"]["rouge1"] == pytest.approx(50)  # of the second reference, and of none
    assert (result["documents"], result["references"]) == (2, 3)


def test_what_is_refused(run, pairs, tmp_path, monkeypatch):
    (tmp_path / "plain.txt").write_text("no pair", encoding="utf-8")
    with pytest.raises(InputError, match="is one text, and no pair .* pairs:FILE.tsv"):
        TaskEvaluator("translation", open_corpus(f"text:{tmp_path}/plain.txt"), Decoding(4), pair_separator="\n")
    for wrong, message in (
        (Decoding(0), "max_tokens is 0"),
        (Decoding(2**31), "max_tokens is 2147483648: .* fewer than"),
        (Decoding(4, 0), "num_beams is 0"),
        (Decoding(4, 1, 0.6), "length_penalty is 0.6, but a single beam"),
        (Decoding(4, 2, float("nan")), "length_penalty is nan: use a finite number"),
        (Decoding(4, 2, batch_size=0), "batch_size is 0"),
    ):
        with pytest.raises(InputError, match=message):
            TaskEvaluator("translation", pairs, wrong, pair_separator="\n")
    model = dataclasses.replace(run.config.model, positions="learned", max_positions=100)
    learned = dataclasses.replace(run, config=dataclasses.replace(run.config, model=model))
    with pytest.raises(InputError, match="90 new tokens after a source of .* more than the model's 100 learned .*use"):
        TaskEvaluator("translation", pairs, Decoding(90), pair_separator="\n").check(learned)
    with pytest.raises(InputError, match="prompts at a time x 60 beams, .* GB are free: use fewer beams"):
        TaskEvaluator("translation", pairs, Decoding(10**9, 60), pair_separator="\n").check(run)
    with pytest.raises(InputError, match="60 tokens to the power of it are beyond float32"):
        TaskEvaluator("translation", pairs, Decoding(60, 2, -9.0), pair_separator="\n").check(run)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for task, package in (("translation", "sacrebleu"), ("summarization", "rouge-score")):
        with pytest.raises(InputError, match=f"pip install {package}"):
            TaskEvaluator(task, pairs, Decoding(4), pair_separator="\n")
