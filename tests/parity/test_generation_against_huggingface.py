"""Decoding with our cache, greedily and by beam search, gives token for token what transformers' `generate` gives."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from lm.beams import Search  # noqa: E402
from lm.interop import huggingface  # noqa: E402
from lm.sampling import Sampling  # noqa: E402
from lm.token_generation import generate_ids, search_ids  # noqa: E402

from .families import PAIR_FAMILIES  # noqa: E402
from .peers import GPT2, LLAMA, random_pair_model, resolved, some_ids, weights  # noqa: E402

pytestmark = pytest.mark.parity

NEW = 20
LENGTHS, SOURCE_LENGTHS = (1, 4, 9, 13), (3, 6, 11, 20)


class Side:
    """A random model here and there, and prompts or sources of unequal length."""

    def __init__(self, cfg, params, model, prompts):
        self.cfg, self.params, self.model, self.prompts = cfg, params, model, prompts

    def ours(self, end_id=None):
        how = {"max_tokens": NEW, "sampling": Sampling(0.0), "seed": 0, "end_id": end_id}
        return [row.tolist() for row in generate_ids(self.params, self.cfg, self.prompts, **how)]

    def each(self):
        """Sides of one prompt each."""
        return [Side(self.cfg, self.params, self.model, [prompt]) for prompt in self.prompts]

    def our_beams(self, search, end_id, stop_ids=(), over=None):
        """(ids, score) of the best of each prompt."""
        found = search_ids(
            self.params, self.cfg, self.prompts, search, max_tokens=NEW, end_id=end_id, stop_ids=stop_ids, over=over
        )
        return [[(each.ids.tolist(), each.score) for each in row] for row in found]

    def theirs(self, *, end_id=None, padding_seen=False, **options):
        """Prompts are padded on the left, as transformers wants them, sources on the right."""
        longest = max(map(len, self.prompts))
        tokens, seen = np.zeros((2, len(self.prompts), longest), np.int64)
        for row, prompt in enumerate(self.prompts):
            place = slice(None, len(prompt)) if self.cfg.has_encoder else slice(longest - len(prompt), None)
            tokens[row, place], seen[row, place] = prompt, 1
        with torch.no_grad():
            return self.model.generate(
                torch.tensor(tokens),
                attention_mask=torch.tensor(np.ones_like(seen) if padding_seen else seen),
                do_sample=False,
                max_new_tokens=NEW,
                pad_token_id=0,
                eos_token_id=end_id,
                **options,
            )

    def new(self, ids, ends):
        """What they wrote, without the end and the padding behind it."""
        start = 1 if self.cfg.has_encoder else max(map(len, self.prompts))
        rows = ids[:, start:].tolist()
        return [list(itertools.takewhile(lambda token: token not in ends, row)) for row in rows]

    def their_beams(self, search, ends, **options):
        found = self.theirs(
            end_id=list(ends),
            num_beams=search.num_beams,
            length_penalty=search.length_penalty,
            early_stopping=search.early_stopping,
            num_return_sequences=search.num_return,
            return_dict_in_generate=True,
            output_scores=True,
            repetition_penalty=search.repetition_penalty,
            **options,
        )
        pairs = list(zip(self.new(found.sequences, ends), found.sequences_scores.tolist(), strict=True))
        return [pairs[i : i + search.num_return] for i in range(0, len(pairs), search.num_return)]


def lively(model, gain: float):
    """With what a target has already as strong as its source: random weights else write one token for ever."""
    with torch.no_grad():
        for name, weight in model.decoder.block.named_parameters():
            if name.endswith("EncDecAttention.o.weight"):
                weight.mul_(0.25)
            if name.endswith(("SelfAttention.o.weight", "SelfAttention.q.weight", "wo.weight")):
                weight.mul_(gain)
    return model


@pytest.fixture(scope="module", params=["gpt2", "llama", "t5", "flan-t5"])
def side(request, tmp_path_factory):
    if request.param in PAIR_FAMILIES:
        folder = tmp_path_factory.mktemp(request.param)
        model = lively(random_pair_model(PAIR_FAMILIES[request.param], folder), 4.0 if request.param == "t5" else 1.0)
        model.save_pretrained(folder)
        run = huggingface.load(folder)
        sources = [some_ids(run.config.model, 1, length, seed=length)[0] for length in SOURCE_LENGTHS]
        return Side(run.config.model, run.params, model, sources)
    family = {"gpt2": GPT2, "llama": LLAMA}[request.param]
    cfg = resolved(family.config, vocabulary=101, positions=40)
    model = family.model(cfg, gain=4.0)
    prompts = [some_ids(cfg, 1, length, seed=length)[0] for length in LENGTHS]
    return Side(cfg, family.params(weights(model), cfg), model, prompts)


def test_greedy_tokens_equal(side):
    found = side.ours()
    assert found == side.new(side.theirs(), ())
    assert all(len(row) == NEW for row in found)
    assert sorted(len(set(row)) for row in found)[1] > 3, found
    assert found != side.new(side.theirs(padding_seen=True), ())

    end_id = found[0][7]
    ended = side.ours(end_id)
    assert ended == side.new(side.theirs(end_id=end_id), (end_id,))
    assert len(ended[0]) <= 7


def same(found, expected):
    assert [[ids for ids, _ in row] for row in found] == [[ids for ids, _ in row] for row in expected]
    scores = [[score for _, score in row] for row in found]
    np.testing.assert_allclose(scores, [[score for _, score in row] for row in expected], rtol=1e-4, atol=1e-4)


SEARCHES = [
    Search(4), Search(4, 0.0), Search(4, 2.0, True, 4), Search(4, -1.0, False, 2), Search(4, 1.0, "never", 3),
    Search(4, 0.6, True), Search(2, 1.0, False, 2), Search(1),
]  # fmt: skip


@pytest.fixture(scope="module")
def ends(side):
    """Ids that end rows at different places: of those that beams write, some that many have, not at their beginning."""
    written = [ids for row in side.our_beams(Search(4, num_return=4), None) for ids, _ in row]
    common = Counter(token for ids in written for token in set(ids[4:]) - set(ids[:4]))
    return tuple(token for token, _ in common.most_common(2))


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_beams_and_their_scores_equal(side, ends, search):
    """Scores to 1e-4: sums of up to 20 float32 log-probabilities."""
    found = side.our_beams(search, ends[0])
    if search.num_beams == 1:
        assert [row[0][0] for row in found] == side.ours(ends[0])
        return
    same(found, side.their_beams(search, ends[:1]))


def test_beams_with_several_stop_ids_equal(side, ends):
    found = side.our_beams(Search(4, 1.0, False, 4), ends[0], ends[1:])
    expected = side.their_beams(Search(4, 1.0, False, 4), ends)
    assert [[ids for ids, _ in row] for row in found] == [[ids for ids, _ in row] for row in expected]


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_beams_with_a_repetition_penalty_equal(side, ends, penalty):
    """Prompt by prompt there: what pads a prompt counts as seen there."""
    search = Search(4, 1.0, False, 3, penalty)
    found = side.our_beams(search, ends[0])
    same(found, [alone.their_beams(search, ends[:1])[0] for alone in side.each()])
    assert [ids for ids, _ in found[0]] != [ids for ids, _ in side.our_beams(Search(4, num_return=3), ends[0])[0]]


def test_beams_that_end_for_another_reason_equal(side, ends):
    """Here where two ids follow each other, as with a text to stop at."""
    free = side.our_beams(Search(4, num_return=3), None)
    pair = free[0][0][0][3:5]
    search = Search(4, 1.0, False, 3)

    class Ends(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return (input_ids[:, -2:] == torch.tensor(pair)).all(dim=1)

    found = side.our_beams(search, ends[1], over=lambda _, ids: ids[-2:].tolist() == pair)
    same(found, side.their_beams(search, ends[1:], stopping_criteria=transformers.StoppingCriteriaList([Ends()])))
    assert any(ids[-2:] == pair and len(ids) < NEW for row in found for ids, _ in row)


def test_the_beam_tests_can_fail(side, ends):
    """Beams end at different places, and neither greedy tokens, another penalty nor another rule to stop give them."""

    def ids(search, *more):
        return [[ids for ids, _ in row] for row in side.our_beams(search, ends[0], *more)]

    found = ids(Search(4, 1.0, False, 4))
    assert len({len(each) for row in found for each in row}) > 2
    assert [row[0] for row in found] != side.ours(ends[0])
    assert ids(Search(4, -1.0, False, 4)) != found != ids(Search(4, 1.0, False, 4), ends[1:])
    assert ids(Search(4, 2.0, "never", 4), ends[1:]) != ids(Search(4, 2.0, True, 4), ends[1:])
