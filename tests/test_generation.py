"""Generation: the cache changes nothing, company changes nothing, and draws follow the stated distribution."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from lm.config import InputError, ModelConfig, RunConfig
from lm.data.tokenizer import ByteTokenizer, FileTokenizer
from lm.generation import Sampling, _continuation, generate, generate_ids, pick
from lm.nn import language_model, params

GREEDY = Sampling(0.0)


@pytest.fixture(scope="module")
def cfg():
    model = ModelConfig(num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, positions="rotary", init_std=0.4)
    return RunConfig(model=model).resolve(258).model


@pytest.fixture(scope="module")
def tree(cfg):
    return params.initialize(language_model.model_specs(cfg), jax.random.key(1))


PROMPTS = [np.array(ids, np.int32) for ids in ([256], [256, 72, 105], [256, *range(97, 110)])]


def run(tree, cfg, prompts, sampling=GREEDY, max_tokens=12, seed=0, end_id=None):
    return generate_ids(tree, cfg, prompts, max_tokens=max_tokens, sampling=sampling, seed=seed, end_id=end_id)


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


LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -np.inf])


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1.0), 5), (Sampling(0.5), 5), (Sampling(1.7, top_k=2), 2), (Sampling(1.0, top_k=50), 5),
        (Sampling(1.0, top_p=0.5), 1), (Sampling(1.0, top_p=0.8), 3), (Sampling(1.0, top_p=1.0), 5),
        (Sampling(1.0, top_k=4, top_p=0.85), 3),
    ],
)  # fmt: skip
def test_draws_follow_the_exact_distribution(sampling, kept):
    """Chi-square of 20,000 draws against softmax(logits / temperature) cut to the kept tokens, at the 0.1 % level."""
    draws = 20_000
    keys = jax.random.split(jax.random.key(0), draws)
    logits = jnp.tile(jnp.asarray(LOGITS, jnp.float32), (draws, 1))
    tokens = jax.jit(lambda logits, k, t: pick(logits, k, t, sampling))(logits, keys, jnp.float32(sampling.temperature))
    weights = np.exp(LOGITS / sampling.temperature) * (np.arange(6) < kept)
    expected = draws * weights / weights.sum()
    counts = np.bincount(tokens, minlength=6)
    assert counts[kept:].sum() == 0
    statistic = ((counts[:kept] - expected[:kept]) ** 2 / expected[:kept]).sum()
    assert statistic < {1: 1e-9, 2: 10.83, 3: 13.82, 5: 18.47}[kept]


def test_greedy_takes_the_best():
    assert int(pick(jnp.asarray(LOGITS[None]), None, jnp.float32(0), GREEDY)[0]) == 0


def test_text_in_text_out(tree, cfg):
    texts = generate(tree, cfg, ByteTokenizer(), ["", "héllo 👋"], max_tokens=5, sampling=Sampling(1.0), seed=0)
    assert len(texts) == 2 and all(isinstance(text, str) for text in texts)
    assert generate(tree, cfg, ByteTokenizer(), [], max_tokens=5, sampling=GREEDY, seed=0) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sampling": Sampling(-1.0)}, "temperature"), ({"sampling": Sampling(float("nan"))}, "temperature"),
        ({"sampling": Sampling(1.0, top_k=0)}, "top_k"), ({"sampling": Sampling(1.0, top_p=0.0)}, "top_p"),
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
