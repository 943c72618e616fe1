"""Generation: the cache changes nothing, company changes nothing, and draws follow the stated distribution."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers

import lm
from lm import beams, decoding, generation, generation_memory
from lm.beams import Search
from lm.config import InputError, ModelConfig, RunConfig
from lm.data.tokenizer import ByteTokenizer, FileTokenizer, train_bpe
from lm.decoding import Sizes
from lm.generation import _continuation, generate, n_best
from lm.nn import language_model, params
from lm.sampling import Sampling
from lm.token_generation import generate_ids, search_ids

GREEDY = Sampling(0.0)
STORIES = Path(__file__).parents[2] / "shared" / "data" / "stories260K"


@pytest.fixture(scope="module")
def cfg():
    model = ModelConfig(num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, positions="rotary", init_std=0.4)
    return RunConfig(model=model).resolve(258).model


@pytest.fixture(scope="module")
def tree(cfg):
    return params.initialize(language_model.model_specs(cfg), jax.random.key(1))


PROMPTS = [np.array(ids, np.int32) for ids in ([256], [256, 72, 105], [256, *range(97, 110)])]


def run(tree, cfg, prompts, sampling=GREEDY, max_tokens=12, seed=0, end_id=None, **options):
    return generate_ids(
        tree, cfg, prompts, max_tokens=max_tokens, sampling=sampling, seed=seed, end_id=end_id, **options
    )


def by_whole_passes(tree, cfg, prompt, count):
    """Greedy decoding with no cache: the whole row again for every token."""
    apply = jax.jit(lambda ids_1T: language_model.apply(tree, ids_1T, cfg=cfg))
    row = np.zeros((1, len(prompt) + count), np.int32)
    row[0, : len(prompt)] = prompt
    for position in range(len(prompt), len(prompt) + count):
        row[0, position] = int(apply(row)[0, position - 1].argmax())
    return row[0, len(prompt) :]


def test_greedy_with_cache_equals_whole_passes(tree, cfg):
    for got, prompt in zip(run(tree, cfg, PROMPTS), PROMPTS, strict=True):
        np.testing.assert_array_equal(got, by_whole_passes(tree, cfg, prompt, 12))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("instructions", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_step_by_step_gives_the_logits_of_a_whole_pass(tree, cfg, monkeypatch, rows, instructions, tied):
    """Within bfloat16's rounding, far below the logits: with its products in the processor and without."""
    monkeypatch.setattr(decoding, "have_bfloat16", lambda: instructions)
    monkeypatch.setattr("lm.nn.matmul.LEAST_SHARED", 1)  # small matrices are shared out, too
    cfg = dataclasses.replace(cfg, compute_dtype="bfloat16", tie_embeddings=tied)
    tree = params.initialize(language_model.model_specs(cfg), jax.random.key(1))
    ids = np.array([PROMPTS[2]] * rows)
    whole_BTV = np.asarray(jax.jit(lambda ids: language_model.apply(tree, ids, cfg=cfg))(ids), np.float32)
    ready = decoding._ready(tree, cfg=cfg, shares=2)
    stored = {leaf.dtype.name for leaf in jax.tree.leaves(ready["layers"]) if leaf.ndim > 2}
    assert stored == ({"bfloat16"} if instructions else {"float32"})
    ready = decoding.with_head(ready, cfg, greedy=True)
    begun = decoding.begin(tree, cfg, list(ids), Sizes(rows, 16, 16, 0))
    logits_BV, cache = jax.jit(functools.partial(decoding.step, cfg=cfg))(
        ready, begun.token_B, begun.position_B, begun.cache, None
    )
    logits_BV, wanted_BV = logits_BV[:, : cfg.vocab_size], whole_BTV[:, -1, : cfg.vocab_size]
    np.testing.assert_allclose(logits_BV, wanted_BV, atol=0.03 * np.abs(wanted_BV).max())
    assert cache.keys[0][0].dtype == "float32"


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_large_cache_is_in_parts_and_writes_the_same(tree, cfg, monkeypatch, num_beams):
    monkeypatch.setattr(decoding, "LARGE_CACHE", 2**40)
    how = {"max_tokens": 29, "num_beams": num_beams}
    whole = run(tree, cfg, PROMPTS, **how)
    jax.clear_caches()  # what is compiled doesn't know the limit
    sizes = Sizes.of(cfg, PROMPTS, 29, num_beams)
    assert [len(parts) for parts in decoding.empty_cache(cfg, sizes).keys] == [1] * cfg.num_layers
    monkeypatch.setattr(decoding, "LARGE_CACHE", 8 * 4 * num_beams * sizes.slots * cfg.kv_heads * cfg.head_width)
    assert {len(parts) for parts in decoding.empty_cache(cfg, sizes).keys} <= {1, 5, 6, 7, 8}
    assert len(decoding.empty_cache(cfg, sizes).keys[-1]) > 1
    for got, wanted in zip(run(tree, cfg, PROMPTS, **how), whole, strict=True):
        np.testing.assert_array_equal(got, wanted)
    jax.clear_caches()


def test_learned_positions_too(cfg):
    cfg = dataclasses.replace(cfg, positions="learned", max_positions=40)
    tree = params.initialize(language_model.model_specs(cfg), jax.random.key(1))
    for got, prompt in zip(run(tree, cfg, PROMPTS), PROMPTS, strict=True):
        np.testing.assert_array_equal(got, by_whole_passes(tree, cfg, prompt, 12))


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8), Sampling(0.8, top_k=9, top_p=0.9)])
def test_unequal_prompts_in_a_batch_equal_one_by_one(tree, cfg, sampling):
    together = run(tree, cfg, PROMPTS, sampling)
    np.testing.assert_array_equal(together[0], run(tree, cfg, PROMPTS[:1], sampling)[0])
    # row 1 keeps its own key whatever stands in row 0 and row 2
    np.testing.assert_array_equal(together[1], run(tree, cfg, [PROMPTS[2], PROMPTS[1]], sampling)[1])


def test_a_row_ends_at_the_end_id_and_the_others_go_on(tree, cfg):
    free = run(tree, cfg, PROMPTS)
    end = int(free[2][3])
    stopped = run(tree, cfg, PROMPTS, end_id=end)
    for row, whole in zip(stopped, free, strict=True):
        until = list(whole).index(end) if end in whole else len(whole)
        np.testing.assert_array_equal(row, whole[:until])
    assert len(stopped[2]) <= 3


def test_seed_decides(tree, cfg):
    one, again, other = (run(tree, cfg, PROMPTS, Sampling(1.0), seed=seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


def test_text_in_text_out(tree, cfg):
    texts = generate(tree, cfg, ByteTokenizer(), ["", "héllo 👋"], max_tokens=5, sampling=Sampling(1.0), seed=0)
    assert len(texts) == 2 and all(isinstance(text, str) for text in texts)
    assert generate(tree, cfg, ByteTokenizer(), [], max_tokens=5, sampling=GREEDY, seed=0) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sampling": Sampling(-1.0)}, "temperature"), ({"stop_ids": [258]}, "stop id 258"), ({"seed": -1}, "seed"),
        ({"seeds": [1]}, "1 seeds for 3"), ({"num_beams": 2, "sampling": Sampling(1.0)}, "draws nothing"),
        ({"num_beams": 200}, "use 129 or fewer"), ({"num_beams": 0}, "num_beams is 0"),
        ({"max_tokens": 0}, "max_tokens"), ({"prompts": [np.array([], np.int32)]}, "empty prompt"),
    ],
)  # fmt: skip
def test_wrong_values_are_named(tree, cfg, change, told):
    arguments = {"prompts": PROMPTS, **change}
    with pytest.raises(InputError, match=told):
        run(tree, cfg, **arguments)


def test_past_the_learned_positions_is_refused_with_what_fits(cfg):
    cfg = dataclasses.replace(cfg, positions="learned", max_positions=16)
    tree = params.initialize(language_model.model_specs(cfg), jax.random.key(1))
    with pytest.raises(InputError, match="16 learned positions: use max_tokens 3 or fewer"):
        run(tree, cfg, PROMPTS)
    assert len(run(tree, cfg, PROMPTS, max_tokens=3)[2]) == 3
    assert len(generate(tree, cfg, ByteTokenizer(), ["ab"], max_tokens=None, sampling=GREEDY, seed=0)[0]) > 0
    with pytest.raises(InputError, match="shorten the prompt"):
        run(tree, cfg, [np.zeros(17, np.int32)], max_tokens=1)


def test_a_continuation_keeps_the_space_between():
    """SentencePiece's decoders drop the space in front of a text's first word."""
    words = {"\u2581once": 0, "\u2581upon": 1, "?": 2}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    library.decoder = tokenizers.decoders.Metaspace()
    tokenizer = FileTokenizer(library.to_str())
    assert tokenizer.decode([1]) == "upon"
    assert _continuation(tokenizer, np.array([0]), np.array([1, 1])) == " upon upon"


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"needs the trained model at {STORIES}")
def test_the_stories_model_writes_its_authors_text():
    """Greedily from BOS; the beginning of what they print for it."""
    loaded = lm.load(STORIES)
    [text] = lm.generate(loaded, [""], temperature=0.0, max_tokens=60)
    assert text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw "
        "a big, red ball. She wanted to play with it, but it was too high"
    )
    assert "".join(lm.stream(loaded, "", temperature=0.0, max_tokens=60)) == text


def test_a_text_ends_before_what_it_is_to_stop_at(tree, cfg):
    how = {"max_tokens": 40, "sampling": Sampling(1.3), "seed": 4}
    free = generate(tree, cfg, ByteTokenizer(), ["a", "bc", "def"], **how)
    stop = [free[0][20], free[1][30]]
    stopped = generate(tree, cfg, ByteTokenizer(), ["a", "bc", "def"], **how, stop=stop)
    for whole, text in zip(free, stopped, strict=True):
        assert text == whole[: min([whole.index(each) for each in stop if each in whole], default=len(whole))]
    assert len(stopped[0]) <= 20


def test_a_search_ends_before_what_it_is_to_stop_at(tree, cfg):
    prompts, short = ["a", "bc", "def"], Search(3, 0.0, num_return=3)
    usual = n_best(tree, cfg, ByteTokenizer(), prompts, Search(3), max_tokens=12)
    stop = [usual[0][0].text[1], "not written"]
    free = n_best(tree, cfg, ByteTokenizer(), prompts, short, max_tokens=12)
    found = n_best(tree, cfg, ByteTokenizer(), prompts, short, max_tokens=12, stop=stop)
    for row, alone in zip(found, prompts, strict=True):
        assert not any(stop[0] in one.text for one in row)
        [again] = n_best(tree, cfg, ByteTokenizer(), [alone], short, max_tokens=12, stop=stop)
        assert [one.text for one in row] == [one.text for one in again]
    assert any(stop[0] in one.text for row in free for one in row)
    assert found[0][0].score > free[0][0].score  # it ends with what goes on there
    never = n_best(tree, cfg, ByteTokenizer(), prompts, short, max_tokens=12, stop=stop[1:])
    assert [[one.text for one in row] for row in never] == [[one.text for one in row] for row in free]


def test_a_row_may_have_its_own_seed(tree, cfg):
    drawn = run(tree, cfg, PROMPTS, Sampling(1.0), seeds=[7, 8, 9])
    alone = run(tree, cfg, PROMPTS[2:], Sampling(1.0), seeds=[9])
    np.testing.assert_array_equal(drawn[2], alone[0])
    assert not np.array_equal(drawn[2], run(tree, cfg, PROMPTS[2:], Sampling(1.0), seeds=[7])[0])


def test_batches_change_nothing(tree, cfg):
    prompts = ["a", "bcd", "efghijklmnopqrstuvw", "x", "yz"]
    how = {"max_tokens": 8, "sampling": Sampling(1.0, min_p=0.01, repetition_penalty=1.2), "seed": 1}
    whole = generate(tree, cfg, ByteTokenizer(), prompts, **how)
    assert generate(tree, cfg, ByteTokenizer(), prompts, **how, batch_size=2) == whole


def test_what_does_not_fit_fails_before_anything_is_written(tree, cfg, monkeypatch):
    """Of many batches that with the longest prompt comes first."""
    written = []
    real = generation.generate_ids
    monkeypatch.setattr(generation, "generate_ids", lambda *a, **k: written.append(len(a[2])) or real(*a, **k))
    monkeypatch.setattr(generation_memory, "free_bytes", lambda _: 100_000)
    prompts = ["a", "b" * 1000, "c", "d"]
    for how in ({"max_tokens": 8}, {"max_tokens": None}):
        with pytest.raises(InputError, match="GB are free"):
            generate(tree, cfg, ByteTokenizer(), prompts, sampling=GREEDY, seed=0, batch_size=1, **how)
    assert written == [1, 1]


def test_how_long_a_text_may_be_depends_on_no_other_prompt(cfg):
    cfg = dataclasses.replace(cfg, positions="learned", max_positions=40)
    tree = params.initialize(language_model.model_specs(cfg), jax.random.key(1))
    prompts = ["a", "b" * 35, "c" * 20]
    how = {"max_tokens": None, "sampling": GREEDY, "seed": 0}
    together = generate(tree, cfg, ByteTokenizer(), prompts, **how)
    assert together == [generate(tree, cfg, ByteTokenizer(), [prompt], **how)[0] for prompt in prompts]
    searched = n_best(tree, cfg, ByteTokenizer(), prompts, Search(2), max_tokens=None)
    for prompt, [best] in zip(prompts, searched, strict=True):
        assert n_best(tree, cfg, ByteTokenizer(), [prompt], Search(2), max_tokens=None)[0][0].text == best.text


def test_a_penalty_beyond_float32_is_refused(tree, cfg):
    for penalty, tokens, told in ((-4.0, 60, "use -3.4 or nearer"), (30.0, 60, "use 17 or nearer")):
        with pytest.raises(InputError, match=told):
            search_ids(tree, cfg, PROMPTS, Search(3, penalty), max_tokens=tokens, end_id=257)


def test_a_prompt_that_is_no_text_is_refused_by_every_tokenizer(tree, cfg):
    bpe = train_bpe(["some text to train on"] * 9, 258)
    for tokenizer in (ByteTokenizer(), bpe):
        for how in ({"prompts": ["a\udcff"]}, {"prompts": ["a"], "stop": ["\udcff"]}):
            with pytest.raises(InputError, match="is not UTF-8"):
                generate(tree, cfg, tokenizer, **how, max_tokens=3, sampling=GREEDY, seed=0)


def test_beams_of_a_batch_equal_one_by_one(tree, cfg):
    search = Search(3, 0.7, False, 3)
    how = {"max_tokens": 12, "end_id": 257}
    together = search_ids(tree, cfg, PROMPTS, search, **how)
    for row, prompt in zip(together, PROMPTS, strict=True):
        [alone] = search_ids(tree, cfg, [prompt], search, **how)
        assert [each.ids.tolist() for each in row] == [each.ids.tolist() for each in alone]
        scores = [each.score for each in row]
        assert scores == sorted(scores, reverse=True)
        np.testing.assert_allclose(scores, [each.score for each in alone], rtol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"window": (16,)}])
@pytest.mark.parametrize("sizes, width", [(Sizes(8, 16, 200, 0), 8), (Sizes(2, 16, 4000, 0), 3)])
def test_the_plan_of_memory_is_what_the_compiler_needs(cfg, tree, changes, sizes, width):
    """Of a search and of a draw: at least what XLA counts, the weights aside, and less than twice that."""
    cfg = dataclasses.replace(cfg, **changes)
    ready, prompts = decoding.ready_params(tree, cfg), [PROMPTS[1]] * sizes.rows
    begun = decoding.begin(tree, cfg, prompts, sizes)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(ready))
    one, stops = np.int32(1), np.array([3], np.int32)
    form = beams._Form(cfg, width, begun.prompt_slots, False, False)
    asked = begun._replace(rows=0, prompt_slots=0)
    first = jax.eval_shape(functools.partial(beams._first, form=form, new=sizes.new), asked, one, None)
    numbers = beams._Numbers(one, stops, np.ones(sizes.new + 2, np.float32), np.float32(1))
    searching = beams._whole.lower(ready, first, None, numbers, form=form)
    prompts_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(begun.cache))  # which are there meanwhile
    state = decoding.first_state(begun, jax.random.split(jax.random.key(0), sizes.rows), sizes.new, None)
    drawing = decoding.advance.lower(ready, state, None, one, stops, GREEDY.numbers(), cfg=cfg, form=GREEDY.form())
    for lowered, count, beside in ((searching, width, prompts_bytes), (drawing, 1, 0)):
        found = lowered.compile().memory_analysis()
        needed = found.argument_size_in_bytes + found.temp_size_in_bytes + found.output_size_in_bytes
        needed += beside - found.alias_size_in_bytes - weights
        assert 0.95 * needed <= generation_memory.batch_bytes(cfg, sizes._replace(beams=count)) <= 2 * needed


def test_memory_is_planned(tree, cfg, monkeypatch):
    monkeypatch.setattr(generation_memory, "free_bytes", lambda _: 10**6)
    with pytest.raises(InputError, match=r"3 prompts at a time x 8 beams.* GB are free: use fewer beams"):
        run(tree, cfg, PROMPTS, num_beams=8, max_tokens=200)
    run(tree, cfg, PROMPTS, max_tokens=12)
