"""Draws follow the stated distribution, and options that make no sense are refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import InputError
from lm.sampling import Sampling, pick

LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -np.inf])
SEEN = np.array([True, False, False, True, True, False])
DRAWS = 20_000
CRITICAL = {1: 1e-9, 2: 10.83, 3: 13.82, 4: 16.27, 5: 18.47}  # by kept tokens: chi-square at the 0.1 % level


def counts(sampling, logits=LOGITS):
    form = sampling.form()
    keys = jax.random.split(jax.random.key(0), DRAWS)

    @jax.jit
    def draw(logits, keys, numbers):
        logits_BV = jnp.tile(logits.astype(jnp.float32)[None], (DRAWS, 1))
        return pick(logits_BV, keys, numbers, form, jnp.tile(jnp.asarray(SEEN)[None], (DRAWS, 1)))

    return np.bincount(draw(logits, keys, sampling.numbers()), minlength=len(logits))


def statistic(found, weights):
    expected = DRAWS * weights / weights.sum()
    kept = expected > 0
    assert found[~kept].sum() == 0
    return ((found[kept] - expected[kept]) ** 2 / expected[kept]).sum()


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1.0), 5), (Sampling(0.5), 5), (Sampling(1.7, top_k=2), 2), (Sampling(1.0, top_k=50), 5),
        (Sampling(1.0, top_p=0.5), 1), (Sampling(1.0, top_p=0.8), 3), (Sampling(1.0, top_p=1.0), 5),
        (Sampling(1.0, top_k=4, top_p=0.85), 3), (Sampling(1.0, min_p=0.1), 4), (Sampling(1.0, min_p=0.2), 3),
        (Sampling(2.0, min_p=0.3), 4), (Sampling(1.0, min_p=0.0), 5), (Sampling(1.0, top_k=3, min_p=0.3), 2),
        (Sampling(1.0, top_p=0.8, min_p=0.3), 2),
    ],
)  # fmt: skip
def test_draws_follow_the_exact_distribution(sampling, kept):
    weights = np.exp(LOGITS / sampling.temperature) * (np.arange(6) < kept)
    found = counts(sampling)
    assert statistic(found, weights) < CRITICAL[kept]
    if kept > 1:  # the test sees another temperature
        other = np.exp(LOGITS / sampling.temperature * 1.2) * (np.arange(6) < kept)
        assert statistic(found, other) > CRITICAL[kept]


def test_draws_with_a_repetition_penalty():
    """Positive logits of tokens that are there already are divided, negative ones multiplied, before all else."""
    logits = np.where(SEEN, np.where(LOGITS < 0, LOGITS * 1.5, LOGITS / 1.5), LOGITS)
    found = counts(Sampling(0.7, repetition_penalty=1.5))
    assert statistic(found, np.exp(logits / 0.7)) < CRITICAL[5]
    assert statistic(found, np.exp(LOGITS / 0.7)) > CRITICAL[5]
    assert counts(Sampling(0.0, repetition_penalty=4.0))[1] == DRAWS  # greedily too: 2 / 4 is less than 1


def test_the_order_is_that_of_transformers():
    """Penalty, temperature, top-k, top-p, min-p: the same tokens are kept, with the same probabilities."""
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    sampling = Sampling(0.9, top_k=12, top_p=0.9, min_p=0.05, repetition_penalty=1.3)
    logits_BV = np.random.default_rng(0).normal(0, 2, (40, 30)).astype(np.float32)
    has = np.random.default_rng(1).integers(0, 30, (40, 7))
    expected = torch.tensor(logits_BV)
    for step in (
        process.RepetitionPenaltyLogitsProcessor(1.3),
        process.TemperatureLogitsWarper(0.9),
        process.TopKLogitsWarper(12),
        process.TopPLogitsWarper(0.9),
        process.MinPLogitsWarper(0.05),
    ):
        expected = step(torch.tensor(has), expected)
    from lm.sampling import cut

    seen = np.zeros(logits_BV.shape, bool)
    np.put_along_axis(seen, has, True, axis=1)
    penalized = np.where(seen, np.where(logits_BV < 0, logits_BV * 1.3, logits_BV / 1.3), logits_BV)
    found = jax.nn.softmax(cut(jnp.asarray(penalized), sampling.numbers(), sampling.form()), axis=-1)
    np.testing.assert_allclose(found, torch.softmax(expected, -1), atol=1e-6)


def test_greedy_takes_the_best():
    greedy = Sampling(0.0)
    assert int(pick(jnp.asarray(LOGITS[None]), None, greedy.numbers(), greedy.form())[0]) == 0


def test_what_is_compiled_doesnt_depend_on_the_numbers():
    one, other = Sampling(0.3, 5, 0.9, 0.1, 1.2), Sampling(0.8, 5, 0.5, 0.2, 1.4)
    assert one.form() == other.form() != Sampling(0.3, 5, 0.9, 0.1).form()
    assert Sampling(1.0, None, 1.0, 0.0, 1.0).form() == Sampling(1.0).form()


@pytest.mark.parametrize(
    ("sampling", "told"),
    [
        (Sampling(-1.0), "temperature is -1"), (Sampling(float("nan")), "temperature is nan"),
        (Sampling(1.0, top_k=0), "top_k is 0"), (Sampling(1.0, top_p=0.0), "top_p is 0"),
        (Sampling(1.0, top_p=1.5), "top_p is 1.5"), (Sampling(1.0, min_p=-0.1), "min_p is -0.1"),
        (Sampling(1.0, repetition_penalty=0.0), "repetition_penalty is 0"),
        (Sampling(0.0, top_k=5), "top_k is 5, but temperature 0"), (Sampling(0.0, top_p=0.9), "top_p is 0.9, but"),
        (Sampling(0.0, min_p=0.1), "min_p is 0.1, but"), (Sampling(1e39), "finite in float32"),
        (Sampling(1e-46), "temperature is 1e-46"), (Sampling(1.0, top_p=1e-50), "top_p is 1e-50"),
    ],
)  # fmt: skip
def test_wrong_values_are_named(sampling, told):
    with pytest.raises(InputError, match=told):
        sampling.validate()
