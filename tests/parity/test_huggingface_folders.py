"""Folders of transformers open here, and ours there, to the same logits, for every family that lm knows."""

from __future__ import annotations

import dataclasses
import functools
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from lm.checkpoint import Loaded  # noqa: E402
from lm.config import RunConfig  # noqa: E402
from lm.data.tokenizer import ByteTokenizer, train_bpe  # noqa: E402
from lm.interop import huggingface, huggingface_config  # noqa: E402
from lm.nn import language_model  # noqa: E402
from lm.nn import params as declare  # noqa: E402
from lm.nn.cache import KeyValueCache  # noqa: E402

from .families import FAMILIES  # noqa: E402
from .peers import GPT2, difference, randomized, resolved, some_ids  # noqa: E402

pytestmark = pytest.mark.parity

# Both compute in float32 and add in another order. Relative to the largest logit.
TOLERANCE = 1e-5
CLEARLY = 100 * TOLERANCE
LENGTH, PROMPT = 16, 11


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """(family, their model, ours opened from their folder, the folder)."""
    family, folder = FAMILIES[request.param], tmp_path_factory.mktemp("theirs")
    (folder / "config.json").write_text(json.dumps(family.config))
    config = transformers.AutoConfig.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    theirs = randomized(theirs, table_std=0.05, gain=2.0)
    theirs.save_pretrained(folder)
    return family, theirs, huggingface.load(folder), folder


def their_logits(theirs, tokens_BT, **options):
    with torch.no_grad():
        return theirs(input_ids=torch.tensor(tokens_BT), use_cache=False, **options).logits.numpy()


def our_logits(run, tokens_BT, segments_BT=None, **change):
    cfg = dataclasses.replace(run.config.model, **change)
    return np.asarray(language_model.apply(run.params, tokens_BT, segments_BT, cfg=cfg))


def test_logits_equal(pair):
    _, theirs, run, _ = pair
    tokens_BT = some_ids(run.config.model, 2, LENGTH)
    expected = their_logits(theirs, tokens_BT)
    assert np.abs(expected).max() > 0.5  # enough for a tolerance to mean something
    assert difference(our_logits(run, tokens_BT), expected) < TOLERANCE


def test_rows_padded_on_the_right(pair):
    _, theirs, run, _ = pair
    tokens_BT = some_ids(run.config.model, 2, LENGTH)
    segments_BT = (np.arange(LENGTH)[None, :] < np.array([[LENGTH], [11]])).astype(np.int32)
    expected = their_logits(theirs, tokens_BT, attention_mask=torch.tensor(segments_BT))
    seen = segments_BT == 1
    assert difference(our_logits(run, tokens_BT, segments_BT)[seen], expected[seen]) < TOLERANCE


def test_decoding_with_the_cache(pair):
    """A prompt at once, then token by token, against their whole row."""
    _, theirs, run, _ = pair
    cfg = run.config.model
    tokens_BT = some_ids(cfg, 2, LENGTH)
    expected = their_logits(theirs, tokens_BT)
    cache = KeyValueCache.empty(cfg.num_layers, 2, LENGTH, cfg.kv_heads, cfg.head_width, "float32")
    found = []
    for start, end in ((0, PROMPT), *((at, at + 1) for at in range(PROMPT, LENGTH))):
        positions_BT = jnp.broadcast_to(jnp.arange(start, end), (2, end - start))
        x_BTD, cache = language_model.forward_cached(
            run.params,
            tokens_BT[:, start:end],
            jnp.ones_like(positions_BT),
            positions_BT,
            cache,
            cfg=cfg,
            constrain=language_model.unconstrained,
        )
        found.append(language_model.logits(run.params, x_BTD, cfg=cfg, constrain=language_model.unconstrained))
    assert difference(np.concatenate(found, axis=1), expected) < TOLERANCE


def test_transformers_opens_what_we_write(pair, tmp_path):
    """In shards, from tables with rows of padding, which are left out again."""
    family, theirs, run, _ = pair
    padded = dataclasses.replace(run.config.model, vocab_multiple=16, dropout=0.1, compute_dtype="bfloat16")
    more = padded.padded_vocabulary - padded.vocabulary
    params = {**run.params, "embed": dict(run.params["embed"])}
    params["embed"]["tokens"] = jnp.pad(run.params["embed"]["tokens"], ((0, more), (0, 0)), constant_values=7)
    if "head" in params:
        params["head"] = {"kernel": jnp.pad(run.params["head"]["kernel"], ((0, 0), (0, more)), constant_values=7)}
    config = dataclasses.replace(run.config, model=padded)
    files = huggingface.save(
        dataclasses.replace(run, config=config, params=params), tmp_path / "ours", max_shard_bytes=9000
    )
    assert sum(path.suffix == ".safetensors" for path in files) > 2
    back, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(back) is type(theirs)
    assert back.config.model_type == family.config["model_type"]
    for name, weight in theirs.named_parameters():
        assert torch.equal(weight, back.get_parameter(name)), name
    tokens_BT = some_ids(padded, 2, LENGTH)
    assert difference(their_logits(back, tokens_BT), their_logits(theirs, tokens_BT)) < 1e-6  # the same program


def test_config_as_either_version_writes_it(pair):
    """The folder has what transformers wrote; the family's is as version 4 did."""
    family, _, run, folder = pair
    written = json.loads((folder / "config.json").read_text())
    assert written != family.config
    for config in (family.config, written, huggingface_config.write(run.config.model)[1]):
        read = huggingface_config.read(config, "here")[1]
        assert huggingface_config.arithmetic(read) == huggingface_config.arithmetic(run.config.model)
        assert read.max_positions == run.config.model.max_positions == 48


def test_every_field_matters(pair):
    family, theirs, run, _ = pair
    tokens_BT = some_ids(run.config.model, 2, LENGTH)
    expected = their_logits(theirs, tokens_BT)
    for change in family.changes:
        assert difference(our_logits(run, tokens_BT, **change), expected) > CLEARLY, change
    for part in family.parts:
        params = jax.tree.map(lambda leaf: leaf, run.params)
        for path in part.split():
            *above, name = path.split("/")
            del functools.reduce(dict.__getitem__, above, params)[name]
        without = dataclasses.replace(run, params=params)
        assert difference(our_logits(without, tokens_BT), expected) > CLEARLY, part


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_gemma_without_windows(name, tmp_path):
    """transformers wants a window in its config even where no layer has one."""
    cfg = huggingface_config.read(FAMILIES[name].config, "here")[1]
    cfg = dataclasses.replace(cfg, window=None, rotary_base=10_000.0, rotary_factor=1.0)
    params = declare.initialize(language_model.model_specs(cfg), jax.random.key(0))
    run = Loaded(RunConfig(model=cfg), params, None, None, tmp_path)
    huggingface.save(run, tmp_path / "out", family=name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    tokens_BT = some_ids(cfg, 2, LENGTH)
    assert difference(their_logits(theirs, tokens_BT), our_logits(run, tokens_BT)) < TOLERANCE


def test_greedy_tokens_of_an_exported_model(tmp_path):
    """Through generate on both sides, for the family with the most kinds of layers."""
    from lm.sampling import Sampling
    from lm.token_generation import generate_ids

    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(FAMILIES["gemma3_text"].config))
    config = transformers.AutoConfig.from_pretrained(tmp_path / "theirs")
    theirs = randomized(transformers.AutoModelForCausalLM.from_config(config), table_std=0.05, gain=2.0)
    theirs.save_pretrained(tmp_path / "theirs")
    run = huggingface.load(tmp_path / "theirs")
    huggingface.save(run, tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    prompt = some_ids(run.config.model, 1, PROMPT)[0]
    (found,) = generate_ids(
        run.params, run.config.model, [prompt], max_tokens=16, sampling=Sampling(0.0), seed=0, end_id=None
    )
    expected = back.generate(
        torch.tensor(prompt)[None].long(), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert found.tolist() == expected[0, PROMPT:].tolist()
    assert len(set(found.tolist())) > 3


def test_auto_tokenizer_has_our_ids(tmp_path):
    """Of the bytes, and of a BPE trained here; special ids included."""
    text = "Grüße, 1234 tokens!\n\tdef f(x):  return x"
    trained = train_bpe([text * 20], 280)
    for number, tokenizer in enumerate((ByteTokenizer(), trained)):
        cfg = RunConfig(model=resolved(GPT2.config, tokenizer.vocab_size, 16))
        params = jax.tree.map(np.asarray, declare.initialize(language_model.model_specs(cfg.model), jax.random.key(0)))
        run = Loaded(cfg, params, tokenizer, None, tmp_path)
        huggingface.save(run, tmp_path / str(number))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / str(number))
        assert theirs(text)["input_ids"] == tokenizer.encode(text).tolist()
        assert theirs.decode(theirs(text)["input_ids"]) == text
        assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos, tokenizer.eos)
        assert len(theirs) == tokenizer.vocab_size
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(number))
        assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos


def test_a_tokenizer_that_transformers_opens_otherwise_is_told(tmp_path):
    """That of a Qwen 2 is Qwen's, whatever the file says."""
    tokenizer = ByteTokenizer()
    config = {**FAMILIES["qwen2-no-window"].config, "vocab_size": tokenizer.vocab_size}
    model = huggingface_config.read(config, "here")[1]
    params = jax.tree.map(np.asarray, declare.initialize(language_model.model_specs(model), jax.random.key(0)))
    with pytest.warns(UserWarning, match="Qwen's own normalisation"):
        huggingface.save(Loaded(RunConfig(model=model), params, tokenizer, None, tmp_path), tmp_path / "out")
    text = "cafe\u0301"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(text)["input_ids"] != tokenizer.encode(text).tolist()
