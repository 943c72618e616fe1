"""The config: exact round trip, and every mistake found before anything runs."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import pytest

import lm
from lm.cli import train_arguments
from lm.config import InputError, RunConfig
from lm.differences import forbidden_on_resume
from lm.nn import params
from lm.nn.language_model import model_specs
from lm.validation import validate


def changed(**sections) -> RunConfig:
    """The default config with some fields changed: changed(model={"num_heads": 3})."""
    config = RunConfig()
    return dataclasses.replace(
        config,
        **{name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()},
    )


@pytest.mark.parametrize("name", lm.preset_names())
def test_presets_are_valid_and_survive_json(name):
    config = validate(lm.preset(name)).resolve(vocab_size=60000)
    again = RunConfig.from_json(config.to_json())
    assert again == config
    assert json.loads(config.to_json())["schema_version"] == 1


@pytest.mark.parametrize(
    ("name", "vocabulary", "parameters"),
    [
        ("gpt2_124m", 50257, 124_439_808),  # as GPT-2 small has
        ("llama_1b", 128_256, 1_235_814_400),  # as Llama 3.2 1B has, its head tied
        (
            "torch_tutorial",
            28_782,
            2 * 28_782 * 200 + 28_782 + 2 * (4 * 200 * 200 + 4 * 200 + 2 * (200 * 200 + 200) + 800),
        ),
    ],
)
def test_parameter_counts(name, vocabulary, parameters):
    """Shapes of the large presets through eval_shape: nothing is allocated."""
    config = lm.preset(name)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_multiple=1)).resolve(vocabulary)
    specs = model_specs(config.model)
    shapes = jax.eval_shape(lambda: params.initialize(specs, jax.random.key(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == params.count(specs) == parameters


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"model": {"num_heads": 3}}, ["num_heads 3", "d_model 128"]),
        ({"model": {"num_kv_heads": 3}}, ["num_kv_heads 3", "num_heads 4"]),
        ({"model": {"positions": "rotary", "head_dim": 5}}, ["rotary", "5"]),
        ({"model": {"positions": "sinusoidal", "d_model": 33, "num_heads": 3}}, ["sinusoidal", "33"]),
        ({"model": {"max_positions": 10}}, ["max_positions 10", "context 256"]),
        ({"model": {"dropout": 1.0}}, ["model.dropout", "less than 1"]),
        ({"model": {"dropout": -0.1}}, ["model.dropout", "0 or more"]),
        ({"model": {"num_layers": 0}}, ["model.num_layers", "more than 0"]),
        ({"model": {"num_layers": 2.0}}, ["model.num_layers", "whole number"]),
        ({"model": {"num_layers": True}}, ["model.num_layers", "whole number"]),
        ({"model": {"bias": "yes"}}, ["model.bias", "True or False"]),
        ({"model": {"activation": "swish"}}, ["model.activation", "'swiglu'"]),
        ({"model": {"norm_offset": True}}, ["model.norm_offset", "'layernorm'"]),
        ({"model": {"window": 0}}, ["model.window", "more than 0"]),
        ({"model": {"window": (8, None, -1)}}, ["model.window[2] is -1", "more than 0"]),
        ({"model": {"window": ()}}, ["model.window", "empty"]),
        ({"model": {"window": (8.5,)}}, ["model.window", "whole number"]),
        ({"model": {"positions": "rotary", "rotary_base": (1e4, math.inf)}}, ["model.rotary_base[1]", "finite"]),
        ({"model": {"positions": "rotary", "rotary_factor": ()}}, ["model.rotary_factor", "empty"]),
        ({"model": {"rotary_factor": 2.0}}, ["model.rotary_factor is 2.0", "'learned'", "leave it at 1.0"]),
        ({"model": {"positions": "rotary", "rotary_low_frequency_factor": 2.0}},
         ["rotary_low_frequency_factor is 2.0", "'linear'", "'llama3'"]),
        ({"model": {"positions": "rotary", "rotary_scaling": "llama3"}}, ["'llama3'", "rotary_factor 1.0"]),
        ({"model": {"positions": "rotary", "rotary_scaling": "llama3", "rotary_factor": 8.0,
                    "rotary_low_frequency_factor": 4.0}}, ["frequency_factor 4.0", "not less than"]),
        ({"optimizer": {"learning_rate": math.nan}}, ["optimizer.learning_rate"]),
        ({"optimizer": {"learning_rate": math.inf}}, ["optimizer.learning_rate"]),
        ({"optimizer": {"name": "lion", "epsilon": 1e-6}}, ["optimizer.epsilon is 1e-06", "'lion'", "'adamw'"]),
        ({"optimizer": {"momentum": 0.9}}, ["optimizer.momentum is 0.9", "'adamw'", "leave it at 0.95", "'muon'"]),
        ({"optimizer": {"name": "muon", "momentum": 1.0}}, ["optimizer.momentum", "less than 1"]),
        ({"optimizer": {"schedule": "constant", "final_learning_rate": 0.0}},
         ["optimizer.final_learning_rate is 0.0", "'constant'", "'wsd'"]),
        ({"optimizer": {"decay_fraction": 0.5}}, ["optimizer.decay_fraction is 0.5", "'cosine'", "'wsd'"]),
        ({"optimizer": {"schedule": "wsd", "decay_fraction": 1.5}}, ["optimizer.decay_fraction is 1.5", "at most 1"]),
        ({"optimizer": {"head_factor": 2.0}}, ["optimizer.head_factor is 2.0", "model.tie_embeddings is True"]),
        ({"training": {"ema_decay": 1.0}}, ["training.ema_decay", "less than 1"]),
        ({"training": {"z_loss": 0.0}}, ["training.z_loss", "more than 0"]),
        ({"training": {"max_skipped_steps": -1}}, ["training.max_skipped_steps", "0 or more"]),
        ({"training": {"steps": None}}, ["exactly one", "training.steps"]),
        ({"training": {"seconds": 5.0}}, ["exactly one", "training.steps"]),
        ({"training": {"gradient_accumulation": 3}}, ["gradient_accumulation 3", "batch_size 16"]),
        ({"training": {"label_smoothing": 1.0}}, ["training.label_smoothing is 1.0", "less than 1"]),
        ({"training": {"label_smoothing": -0.1}}, ["training.label_smoothing is -0.1", "0 or more"]),
        ({"model": {"relative_buckets": 8}}, ["relative_buckets is 8", "'learned'", "leave it at 32"]),
        ({"model": {"positions": "relative", "relative_buckets": 2}}, ["relative_buckets is 2", "at least 4"]),
        ({"model": {"positions": "relative", "relative_max_distance": 16}}, ["relative_max_distance 16", "32"]),
        ({"model": {"positions": "relative", "rotary_base": 5.0}}, ["rotary_base is 5.0", "'relative'"]),
        ({"model": {"positions": "relative", "attention": "blockwise"}}, ["'blockwise'", "'relative'", "'auto'"]),
        ({"model": {"positions": "relative", "attention": "prefix"}}, ["'prefix'", "'relative'", "'auto'"]),
        ({"model": {"encoder_layers": 2}}, ["model.encoder_layers is 2", "no encoder", "'encoder_decoder'"]),
        ({"model": {"share_embeddings": False}}, ["model.share_embeddings is False", "no encoder"]),
        ({"model": {"start_id": 0}}, ["model.start_id is 0", "no encoder"]),
        ({"data": {"source_context": 32}}, ["data.source_context is 32", "no encoder"]),
        ({"data": {"long_pairs": "drop"}}, ["data.long_pairs is 'drop'", "no encoder"]),
        ({"data": {"max_length_ratio": 2.0}}, ["data.max_length_ratio is 2.0", "no encoder"]),
        ({"source_tokenizer": {"kind": "bytes"}}, ["source_tokenizer.kind is 'bytes'", "no encoder"]),
        ({"evaluation": {"stride": 300}}, ["stride 300", "window 256"]),
        ({"evaluation": {"window": 512}}, ["window 512", "256 learned positions"]),
        ({"tokenizer": {"kind": "file"}}, ["tokenizer.path"]),
        ({"tokenizer": {"path": "x.json"}}, ["tokenizer.kind", "'bytes'"]),
        ({"tokenizer": {"kind": "bpe", "vocab_size": 100}}, ["tokenizer.vocab_size", "258"]),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_the_way_out(sections, told):
    with pytest.raises(InputError) as error:
        validate(changed(**sections))
    for words in told:
        assert words in str(error.value)


PAIRS = {"model": {"family": "encoder_decoder"}, "data": {"packing": "best_fit"}}


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"data": {"packing": "split"}}, ["data.packing is 'split'", "'best_fit'", "'padded'"]),
        ({"data": {"prompt_loss": True}}, ["data.prompt_loss", "set it to False"]),
        ({"data": {"max_length_ratio": 0.5}}, ["data.max_length_ratio is 0.5", "1 or more"]),
        ({"data": {"source_context": 0}}, ["data.source_context is 0", "more than 0"]),
        ({"data": {"source_context": 300}, "model": {"max_positions": 256}}, ["max_positions 256", "context 300"]),
        ({"evaluation": {"window": 128}}, ["evaluation.window is 128", "scored whole", "None"]),
        ({"source_tokenizer": {"kind": "bytes"}}, ["source_tokenizer.kind is 'bytes'", "share_embeddings is True"]),
        ({"model": {"source_vocab_size": 99}}, ["source_vocab_size is 99", "share_embeddings is True"]),
        ({"model": {"share_embeddings": False}, "source_tokenizer": {"kind": "file"}}, ["source_tokenizer.path"]),
        ({"model": {"share_embeddings": False}, "source_tokenizer": {"kind": "bpe", "vocab_size": 9}}, ["258"]),
        ({"model": {"encoder_layers": 0}}, ["model.encoder_layers is 0", "more than 0"]),
        ({"model": {"start_id": -1}}, ["model.start_id is -1", "0 or more"]),
    ],
)  # fmt: skip
def test_mistakes_with_pairs_are_named_with_the_way_out(sections, told):
    both = {name: {**PAIRS.get(name, {}), **sections.get(name, {})} for name in {*PAIRS, *sections}}
    validate(changed(**PAIRS))
    with pytest.raises(InputError) as error:
        validate(changed(**both))
    for words in told:
        assert words in str(error.value)


def test_the_id_that_targets_begin_with_is_one_of_the_vocabulary():
    config = validate(changed(**PAIRS))
    assert config.resolve(258, first_id=256).model.start_id == 256
    zero = changed(**{**PAIRS, "model": {"family": "encoder_decoder", "start_id": 0}})
    assert zero.resolve(258, first_id=256).model.start_id == 0
    beyond = changed(**{**PAIRS, "model": {"family": "encoder_decoder", "start_id": 258}})
    with pytest.raises(InputError, match="model.start_id is 258, but the vocabulary has 258 tokens"):
        beyond.resolve(258)


PATTERNS = [
    ("--model.window 64", {"window": 64}),
    ("--model.window 64 None", {"window": (64, None)}),
    ("--model.window None 64", {"window": (None, 64)}),
    ("--model.window None", {"window": None}),
    ("--model.rotary_base 10000", {"rotary_base": 10_000.0}),
    ("--model.rotary_base 1e4 1e6", {"rotary_base": (1e4, 1e6)}),
    ("--model.rotary_factor 1 8", {"rotary_factor": (1.0, 8.0)}),
    ("--model.qkv_bias None", {"qkv_bias": None}),
    ("--model.qkv_bias False", {"qkv_bias": False}),
]


@pytest.mark.parametrize(("line", "wanted"), PATTERNS)
def test_patterns_come_from_the_command_line_and_survive_json(line, wanted):
    model = {"positions": "rotary", "window": (7, 7), "rotary_base": (5.0, 5.0), "qkv_bias": True}
    config, *_ = train_arguments(["own", *line.split()], lambda _: changed(model=model))
    assert config == validate(changed(model={**model, **wanted}))
    assert RunConfig.from_json(config.to_json()) == config
    assert isinstance(hash(config.model), int), "static under jit"


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda c: c["model"].update(layers=3), "model.layers"),
        (lambda c: c["model"].update(num_layer=3), "did you mean 'num_layers'"),
        (lambda c: c["data"].update(context="long"), "data.context"),
        (lambda c: c.update(model=3), "'model'"),
        (lambda c: c.update(schema_version=99), "schema_version 99"),
        (lambda c: c.pop("schema_version"), "schema_version None"),
    ],
)
def test_json_of_another_kind_is_refused(edit, told):
    content = json.loads(RunConfig().to_json())
    edit(content)
    with pytest.raises(InputError, match=told):
        RunConfig.from_json(json.dumps(content))


def test_what_a_run_may_change_when_it_goes_on():
    saved = RunConfig()
    free = changed(
        parallel={"fsdp": 8}, checkpoint={"keep": 7}, evaluation={"every_steps": 3}, observe={"every_steps": 9},
        model={"attention": "blockwise", "scan_layers": True, "remat": True}, training={"steps": 2000},
    )  # fmt: skip
    assert forbidden_on_resume(saved, free) == {}
    assert forbidden_on_resume(saved, changed(training={"steps": 10})) == {"training.steps": (1000, 10)}
    assert forbidden_on_resume(saved, changed(training={"seed": 1})) == {"training.seed": (0, 1)}
    assert set(forbidden_on_resume(saved, changed(model={"dropout": 0.1}, data={"context": 8}))) == {
        "model.dropout",
        "data.context",
    }


def test_unknown_preset_gets_the_nearest_name(tmp_path):
    with pytest.raises(InputError, match="did you mean 'shakespeare_char'"):
        lm.preset("shakespere_char")
    own = tmp_path / "own.py"
    own.write_text("from lm import RunConfig\ndef get_config():\n    return RunConfig()\n")
    assert lm.preset(str(own)) == RunConfig()
    own.write_text("x = 1\n")
    with pytest.raises(InputError, match="get_config"):
        lm.preset(str(own))
    for broken in ("import nothing_of_this_name\n", "def get_config():\n    return undefined\n", "def f(:\n"):
        own.write_text(broken)
        with pytest.raises(InputError, match="can't be loaded"):
            lm.preset(str(own))


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("--optimizer.name adafactor", {"beta1": 0.9, "beta2": 0.99, "final_learning_rate": 0.2}),
        ("--optimizer.name lion", {"beta1": 0.8, "beta2": 0.95, "epsilon": 1e-8}),
        ("--optimizer.schedule constant", {"beta2": 0.95, "final_learning_rate": 0.1, "epsilon": 1e-6}),
        ("--optimizer.warmup-steps 3", {"beta2": 0.95, "final_learning_rate": 0.2, "epsilon": 1e-6}),
    ],
)
def test_another_optimizer_on_the_command_line_leaves_out_what_it_does_not_read(line, wanted):
    own = changed(optimizer={"beta1": 0.8, "beta2": 0.95, "epsilon": 1e-6, "final_learning_rate": 0.2})
    config, *_ = train_arguments(["own", *line.split()], lambda _: own)
    validate(config)
    assert {name: getattr(config.optimizer, name) for name in wanted} == wanted


def test_what_is_given_beside_another_optimizer_is_refused_if_it_does_not_read_it():
    line = ["own", "--optimizer.name", "lion", "--optimizer.epsilon", "1e-5"]
    config, *_ = train_arguments(line, lambda _: changed())
    with pytest.raises(InputError, match="optimizer.epsilon is 1e-05, but optimizer.name 'lion' doesn't read it"):
        validate(config)
