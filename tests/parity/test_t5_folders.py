"""T5, Flan-T5 and mT5: their folders open here, and ours there, to the same logits."""

from __future__ import annotations

import dataclasses
import functools
import io
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from lm.data import tokenizer as tokenizers  # noqa: E402
from lm.data.tokenizer import ByteTokenizer, train_bpe  # noqa: E402
from lm.interop import huggingface, huggingface_config  # noqa: E402
from lm.interop.huggingface_weights import weights  # noqa: E402
from lm.nn import decoder, language_model  # noqa: E402
from lm.nn.cache import KeyValueCache  # noqa: E402
from lm.nn.relative import bucket_table  # noqa: E402
from lm.nn.source import Source  # noqa: E402

from .families import PAIR_FAMILIES  # noqa: E402
from .peers import difference, random_pair_model, some_ids  # noqa: E402

pytestmark = pytest.mark.parity

# Both compute in float32 and add in another order. Relative to the largest logit.
TOLERANCE = 2e-5
CLEARLY = 100 * TOLERANCE
GRADIENTS = 5e-5  # relative to the largest of a tensor: sums over all targets that nearly cancel
SOURCE, TARGET = 19, 16
PARTS = ("encoder/relative", "relative", "encoder/layers/attention", "layers/cross_attention", "layers/feed_forward")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """By name: (family, their model, ours opened from their folder, the folder)."""

    @functools.cache
    def made(name):
        family, folder = PAIR_FAMILIES[name], tmp_path_factory.mktemp("theirs")
        return family, random_pair_model(family, folder), huggingface.load(folder), folder

    return made


@pytest.fixture(params=PAIR_FAMILIES)
def pair(request, opened):
    return opened(request.param)


@pytest.fixture(params=["t5", "flan-t5"])
def one_of_two(request, opened):
    """The others differ in nothing that the layers do with rows."""
    return opened(request.param)


def ids(cfg, rows=2, source=SOURCE, target=TARGET):
    return some_ids(cfg, rows, source, seed=1), some_ids(cfg, rows, target, seed=2)


def whole(tokens_BS) -> Source:
    """One piece a row."""
    positions_BS = np.broadcast_to(np.arange(tokens_BS.shape[1], dtype=np.int32), tokens_BS.shape)
    return Source(tokens_BS, np.ones_like(tokens_BS), positions_BS)


_apply = jax.jit(language_model.apply, static_argnames="cfg")


def their_logits(theirs, tokens_BS, tokens_BT, **masks):
    with torch.no_grad():
        return theirs(
            input_ids=torch.tensor(tokens_BS), decoder_input_ids=torch.tensor(tokens_BT), use_cache=False, **masks
        ).logits.numpy()


def our_logits(run, source, tokens_BT, segments_BT=None, positions_BT=None, **change):
    cfg = dataclasses.replace(run.config.model, **change)
    return np.asarray(_apply(run.params, tokens_BT, segments_BT, positions_BT, cfg=cfg, source=source))


def test_logits_equal(pair):
    _, theirs, run, _ = pair
    tokens_BS, tokens_BT = ids(run.config.model)
    expected = their_logits(theirs, tokens_BS, tokens_BT)
    assert np.abs(expected).max() > 0.5  # enough for a tolerance to mean something
    assert difference(our_logits(run, whole(tokens_BS), tokens_BT), expected) < TOLERANCE


def test_distances_beyond_the_largest(tmp_path):
    """With T5's own 32 buckets up to 128 tokens, in rows of 300."""
    theirs = random_pair_model(PAIR_FAMILIES["t5-defaults"], tmp_path)
    run = huggingface.load(tmp_path)
    tokens_BS, tokens_BT = ids(run.config.model, 1, 300, 290)
    expected = their_logits(theirs, tokens_BS, tokens_BT)
    assert difference(our_logits(run, whole(tokens_BS), tokens_BT), expected) < TOLERANCE


def test_padded_rows(one_of_two):
    """On both sides, on the right; the mask matters."""
    _, theirs, run, _ = one_of_two
    tokens_BS, tokens_BT = ids(run.config.model)
    seen_BS = (np.arange(SOURCE)[None, :] < np.array([[SOURCE], [7]])).astype(np.int32)
    seen_BT = (np.arange(TARGET)[None, :] < np.array([[9], [TARGET]])).astype(np.int32)
    masks = {"attention_mask": torch.tensor(seen_BS), "decoder_attention_mask": torch.tensor(seen_BT)}
    expected = their_logits(theirs, tokens_BS, tokens_BT, **masks)[seen_BT == 1]
    source = whole(tokens_BS)._replace(segments_BS=seen_BS)
    assert difference(our_logits(run, source, tokens_BT, seen_BT)[seen_BT == 1], expected) < TOLERANCE
    assert difference(our_logits(run, whole(tokens_BS), tokens_BT)[seen_BT == 1], expected) > CLEARLY


def test_rows_padded_on_the_left(one_of_two):
    """On both sides: a bias counts from token to token, whatever their places."""
    _, theirs, run, _ = one_of_two
    tokens_BS, tokens_BT = ids(run.config.model)
    seen_BS = (np.arange(SOURCE)[None, :] >= np.array([[0], [7]])).astype(np.int32)
    seen_BT = (np.arange(TARGET)[None, :] >= np.array([[5], [0]])).astype(np.int32)
    masks = {"attention_mask": torch.tensor(seen_BS), "decoder_attention_mask": torch.tensor(seen_BT)}
    expected = their_logits(theirs, tokens_BS, tokens_BT, **masks)[seen_BT == 1]
    found = our_logits(run, whole(tokens_BS)._replace(segments_BS=seen_BS), tokens_BT, seen_BT)
    assert difference(found[seen_BT == 1], expected) < TOLERANCE
    alone = our_logits(run, whole(tokens_BS[1:, 7:]), tokens_BT[1:])
    assert difference(found[1:], alone) < TOLERANCE


def test_packed_pairs(one_of_two):
    """Three pairs in a row of each side, and padding, against each pair alone."""
    _, theirs, run, _ = one_of_two
    cfg, lengths = run.config.model, ((5, 4), (3, 6), (8, 3))
    pairs = [[some_ids(cfg, 1, n, seed=10 * i + n) for n in both] for i, both in enumerate(lengths)]
    sides = []
    for side in (0, 1):
        tokens = np.concatenate([*(pair[side][0] for pair in pairs), [7, 7]]).astype(np.int32)[None]
        sizes = [both[side] for both in lengths]
        segments = np.repeat([1, 2, 3, 0], [*sizes, 2]).astype(np.int32)[None]
        positions = np.concatenate([np.arange(n) for n in (*sizes, 2)]).astype(np.int32)[None]
        sides.append((tokens, segments, positions))
    found = our_logits(run, Source(*sides[0]), *sides[1])[0]
    expected = np.concatenate([their_logits(theirs, *pair)[0] for pair in pairs])
    assert difference(found[:-2], expected) < TOLERANCE


class Decoding:
    """Step by step, from a memory of padded sources."""

    def __init__(self, run, tokens_BS, seen_BS, length):
        self.params, self.cfg = run.params, run.config.model
        options = {"cfg": self.cfg, "constrain": language_model.unconstrained}
        source = whole(tokens_BS)._replace(segments_BS=seen_BS)
        memory_BSD = language_model.encode_source(self.params, source, dropout_keys_B=None, **options)
        memory = decoder.remember(self.params["layers"], memory_BSD, seen_BS, **options)
        rows, shape = len(tokens_BS), (self.cfg.kv_heads, self.cfg.head_width)
        self.cache = KeyValueCache.empty(self.cfg.num_layers, rows, length, *shape, "float32")

        @jax.jit
        def step(tokens_BT, start, cache):
            positions_BT = jnp.broadcast_to(start + jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
            x_BTD, cache = language_model.forward_cached(
                self.params, tokens_BT, jnp.ones_like(tokens_BT), positions_BT, cache, memory=memory, **options
            )
            return language_model.logits(self.params, x_BTD, **options), cache

        self._step, self._done = step, 0

    def __call__(self, tokens_BT):
        """The logits of the next tokens."""
        logits_BTV, self.cache = self._step(tokens_BT, self._done, self.cache)
        self._done += tokens_BT.shape[1]
        return np.asarray(logits_BTV)


def test_decoding_with_the_cache(one_of_two):
    """Some targets at once, then token by token, against their whole rows; sources of unequal length."""
    _, theirs, run, _ = one_of_two
    tokens_BS, tokens_BT = ids(run.config.model)
    seen_BS = (np.arange(SOURCE)[None, :] < np.array([[6], [SOURCE]])).astype(np.int32)
    expected = their_logits(theirs, tokens_BS, tokens_BT, attention_mask=torch.tensor(seen_BS))
    decode = Decoding(run, tokens_BS, seen_BS, TARGET)
    found = [decode(tokens_BT[:, low:high]) for low, high in ((0, 11), *((at, at + 1) for at in range(11, TARGET)))]
    assert difference(np.concatenate(found, axis=1), expected) < TOLERANCE
    assert difference(their_logits(theirs, tokens_BS, tokens_BT), expected) > CLEARLY


def test_greedy_tokens_equal(one_of_two):
    """From the id that the folder says targets follow; another gives others."""
    _, theirs, run, _ = one_of_two
    tokens_BS, _ = ids(run.config.model, 4)
    seen_BS = (np.arange(SOURCE)[None, :] < np.array([[6], [SOURCE], [11], [2]])).astype(np.int32)
    start = run.config.model.start_id

    def ours(start):
        decode, written = Decoding(run, tokens_BS, seen_BS, 12), [np.full((4, 1), start, np.int32)]
        for _ in range(12):
            written.append(decode(written[-1]).argmax(-1).astype(np.int32))
        return np.concatenate(written[1:], axis=1).tolist()

    options = {"max_new_tokens": 12, "do_sample": False, "use_cache": False, "eos_token_id": None}
    expected = theirs.generate(
        torch.tensor(tokens_BS), attention_mask=torch.tensor(seen_BS), decoder_start_token_id=start, **options
    )
    assert ours(start) == expected[:, 1:].tolist()
    assert ours(start + 1) != expected[:, 1:].tolist()


def test_gradients_equal(one_of_two):
    """Of the sum of all targets' nats, for every tensor; both tables of distances and the shared one included."""
    family, theirs, run, _ = one_of_two
    cfg = run.config.model
    tokens_BS, tokens_BT = ids(cfg)
    targets_BT = np.roll(tokens_BT, -1, axis=1)
    theirs.zero_grad()
    logits = theirs(input_ids=torch.tensor(tokens_BS), decoder_input_ids=torch.tensor(tokens_BT)).logits
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(targets_BT).long().flatten(), reduction="sum"
    ).backward()
    positions_BT = np.broadcast_to(np.arange(TARGET), tokens_BT.shape)

    @jax.jit
    def gradients(params):
        def nats(params):
            return language_model.loss(
                params, tokens_BT, targets_BT, np.ones(tokens_BT.shape, np.float32), None, positions_BT, cfg=cfg,
                z_loss=None, dropout_keys_B=None, constrain=language_model.unconstrained, source=whole(tokens_BS),
            )[0]  # fmt: skip

        return jax.grad(nats)(params)

    found = gradients(run.params)
    named = {weight.name: weight for weight in weights(cfg, family.config["model_type"])}
    assert named.keys() == dict(theirs.named_parameters()).keys()
    for name, parameter in theirs.named_parameters():
        assert parameter.grad.abs().max() > 1e-3, name
        assert difference(named[name].take(found), parameter.grad.numpy()) < GRADIENTS, name


@pytest.mark.parametrize(("buckets", "longest"), [(32, 128), (8, 12), (9, 20), (4, 3), (6, 1000), (64, 100)])
def test_buckets(buckets, longest):
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = torch.arange(-2 * longest, 2 * longest + 1)
    for both in (False, True):
        expected = T5Attention._relative_position_bucket(distances, both, buckets, longest).numpy()
        table = bucket_table(buckets, bidirectional=both, max_distance=longest)
        assert table[np.clip(distances.numpy(), -longest, longest) + longest].tolist() == expected.tolist()


def test_transformers_opens_what_we_write(pair, tmp_path):
    """In shards, from tables with rows of padding, which are left out again; and it writes the same tokens."""
    family, theirs, run, _ = pair
    padded = dataclasses.replace(run.config.model, vocab_multiple=16, dropout=0.1, compute_dtype="bfloat16")
    more = padded.padded_vocabulary - padded.vocabulary
    params = {**run.params, "embed": dict(run.params["embed"])}
    params["embed"]["tokens"] = jnp.pad(run.params["embed"]["tokens"], ((0, more), (0, 0)), constant_values=7)
    if "head" in params:
        params["head"] = {"kernel": jnp.pad(run.params["head"]["kernel"], ((0, 0), (0, more)), constant_values=7)}
    ours = dataclasses.replace(run, config=dataclasses.replace(run.config, model=padded), params=params)
    name = family.config["model_type"]
    files = huggingface.save(ours, tmp_path / "ours", family=name, max_shard_bytes=9000)
    assert sum(path.suffix == ".safetensors" for path in files) > 2
    back, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(back) is type(theirs)
    for key, weight in theirs.named_parameters():
        assert torch.equal(weight, back.get_parameter(key)), key
    assert back.config.decoder_start_token_id == back.generation_config.decoder_start_token_id
    assert back.config.decoder_start_token_id == family.config.get("decoder_start_token_id", 0)
    tokens_BS, tokens_BT = ids(padded, 4)
    expected = their_logits(theirs, tokens_BS, tokens_BT)
    assert difference(their_logits(back, tokens_BS, tokens_BT), expected) < 1e-6  # the same program
    # Not cached: transformers makes no room for more decoder than encoder layers.
    own, given = {}, {"decoder_start_token_id": run.config.model.start_id}  # what we write says where it starts
    written = [
        model.generate(
            torch.tensor(tokens_BS), max_new_tokens=12, do_sample=False, use_cache=False, eos_token_id=None, **start
        )
        for model, start in ((back, own), (theirs, given))
    ]
    assert len(set(written[0].flatten().tolist())) > 3
    assert torch.equal(*written)
    again = huggingface.load(tmp_path / "ours")
    jax.tree.map(np.testing.assert_array_equal, again.params, run.params)
    assert huggingface_config.arithmetic(again.config.model) == huggingface_config.arithmetic(run.config.model)


def test_config_as_either_version_writes_it(pair):
    """The folder has what transformers wrote; the family's is as version 4 did."""
    family, _, run, folder = pair
    written = json.loads((folder / "config.json").read_text())
    assert written != family.config
    name = family.config["model_type"]
    for config in (family.config, written, huggingface_config.write(run.config.model, name)[1]):
        read = huggingface_config.read(config, "here")[1]
        # of a head of its own version 5 says nothing: the files decide
        read = dataclasses.replace(read, tie_embeddings=not family.own_head)
        assert huggingface_config.arithmetic(read) == huggingface_config.arithmetic(run.config.model)
        assert read.max_positions == run.config.data.context == family.config.get("n_positions", 512)
        assert read.start_id == run.config.model.start_id == family.config.get("decoder_start_token_id", 0)


def test_every_field_matters(pair):
    family, theirs, run, _ = pair
    tokens_BS, tokens_BT = ids(run.config.model, 2, 70, 70)
    expected = their_logits(theirs, tokens_BS, tokens_BT)
    assert difference(our_logits(run, whole(tokens_BS), tokens_BT), expected) < TOLERANCE
    for change in family.changes:
        assert difference(our_logits(run, whole(tokens_BS), tokens_BT, **change), expected) > CLEARLY, change
    for part in PARTS:
        *above, name = part.split("/")
        params = jax.tree.map(lambda leaf: leaf, run.params)
        place = functools.reduce(dict.__getitem__, above, params)
        place[name] = jax.tree.map(jnp.zeros_like, place[name])
        without = dataclasses.replace(run, params=params)
        assert difference(our_logits(without, whole(tokens_BS), tokens_BT), expected) > CLEARLY, part
    if family.own_head:
        tied = dataclasses.replace(run, params={name: x for name, x in run.params.items() if name != "head"})
        assert difference(our_logits(tied, whole(tokens_BS), tokens_BT), expected) > CLEARLY


def test_files_in_bfloat16(tmp_path):
    theirs = random_pair_model(PAIR_FAMILIES["flan-t5"], tmp_path, "bfloat16")
    run = huggingface.load(tmp_path)
    tokens_BS, tokens_BT = ids(run.config.model)
    expected = their_logits(theirs, tokens_BS, tokens_BT)
    assert difference(our_logits(run, whole(tokens_BS), tokens_BT), expected) < TOLERANCE
    assert {leaf.dtype for leaf in jax.tree.leaves(run.params)} == {np.dtype("float32")}


TEXT = "Grüße an den König:  1234 tokens!"


def small(tmp_path, tokenizer):
    """A T5 that has as many rows as the tokenizer, and it."""
    run = huggingface.load(tmp_path / "theirs")
    model, more = run.config.model, tokenizer.vocab_size
    params = {**run.params, "embed": {"tokens": jnp.ones((more, model.d_model))}}
    config = dataclasses.replace(run.config, model=dataclasses.replace(model, vocab_size=more))
    return dataclasses.replace(run, config=config, params=params, tokenizer=tokenizer)


def sentencepiece_model() -> bytes:
    """A Unigram as T5's: padding, EOS, unknown, no BOS."""
    content = io.BytesIO()
    lines = [f"der König {number} sagt: Grüße an alle tokens!" for number in range(300)]
    pytest.importorskip("sentencepiece").SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=content, vocab_size=60, model_type="unigram", minloglevel=2,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    return content.getvalue()


@pytest.mark.parametrize("kind", ["bytes", "bpe", "sentencepiece"])
def test_auto_tokenizer_has_our_ids(kind, tmp_path):
    """And EOS behind them, as what is read here has; in a batch padded by the id that the model knows."""
    random_pair_model(PAIR_FAMILIES["t5"], tmp_path / "theirs")
    made = {"bytes": ByteTokenizer, "bpe": lambda: train_bpe([TEXT * 20], 280)}
    made["sentencepiece"] = lambda: tokenizers.SentencePieceTokenizer(sentencepiece_model())
    ours = made[kind]()
    run = small(tmp_path, ours)
    huggingface.save(run, tmp_path / "ours")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert theirs(TEXT)["input_ids"] == [*ours.encode(TEXT).tolist(), ours.eos]
    assert theirs.decode(theirs(TEXT)["input_ids"], skip_special_tokens=True) == ours.decode(ours.encode(TEXT))
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (ours.eos, ours.pad, ours.vocab_size)
    assert huggingface.load(tmp_path / "ours").tokenizer.encode(TEXT).tolist() == ours.encode(TEXT).tolist()
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "ours")
    start = run.config.model.start_id
    assert (generation.decoder_start_token_id, generation.eos_token_id) == (start, ours.eos)
    assert generation.pad_token_id == (start if ours.pad is None else ours.pad)


def test_t5_s_own_tokenizers_open(tmp_path):
    """spiece.model alone, and the tokenizer.json that transformers makes of it, with its ids for spans."""
    random_pair_model(PAIR_FAMILIES["t5-defaults"], tmp_path)
    (tmp_path / "spiece.model").write_bytes(sentencepiece_model())
    alone = huggingface.load(tmp_path).tokenizer
    theirs = transformers.T5Tokenizer.from_pretrained(tmp_path, extra_ids=5)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "spiece.model").unlink()
    saved = huggingface.load(tmp_path).tokenizer
    for ours in (alone, saved):
        assert [*ours.encode(TEXT).tolist(), ours.eos] == theirs(TEXT)["input_ids"]
        assert (ours.bos, ours.eos, ours.pad) == (None, 1, 0)
    assert saved.vocab_size == 65
