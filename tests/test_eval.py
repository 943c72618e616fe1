"""eval.py's own part: what it refuses before any work, and what it says of a model that has diverged."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from lm import api, scored_text
from lm.checkpoint import Loaded
from lm.config import DataConfig, InputError, ModelConfig, RunConfig
from lm.data.tokenizer import ByteTokenizer
from lm.nn import language_model, params


@pytest.fixture(scope="module")
def command():
    spec = importlib.util.spec_from_file_location("eval_command", Path(__file__).parents[1] / "eval.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where tyro looks for the fields' texts
    spec.loader.exec_module(module)
    return module.evaluate


@pytest.fixture
def model(monkeypatch, tmp_path):
    """What api.load gives: a model with learned positions and without a run's manifest."""
    config = RunConfig(model=ModelConfig(num_layers=1, d_model=16, num_heads=2, max_positions=32)).resolve(258)
    tree = params.initialize(language_model.model_specs(config.model), jax.random.key(0))
    loaded = Loaded(config, tree, ByteTokenizer(), None, tmp_path)
    monkeypatch.setattr(api, "load", lambda path, **_: loaded)
    (tmp_path / "a.txt").write_text("some text", encoding="utf-8")
    (tmp_path / "b.txt").write_text("more text", encoding="utf-8")
    return loaded


def test_refused_before_a_model_is_opened(command, monkeypatch, tmp_path):
    monkeypatch.setattr(api, "load", lambda *_, **__: pytest.fail("opened a model"))
    for flag in ("--json", "--by-document", "--tokens"):
        with pytest.raises(InputError, match=f"{flag} .*in a folder that is there"):
            command(["x", flag, str(tmp_path / "missing" / "file")])
    with pytest.raises(InputError, match="--json and --tokens name one file"):
        command(["x", "--json", str(tmp_path / "f"), "--tokens", str(tmp_path / "f")])


def test_what_is_read_is_not_overwritten(command, monkeypatch, tmp_path):
    monkeypatch.setattr(api, "load", lambda *_, **__: pytest.fail("opened a model"))
    run = tmp_path / "run"
    (run / "checkpoints" / "7").mkdir(parents=True)
    own = [run / "config.json", run / "checkpoints" / "7" / "config.json", tmp_path / "a,b.txt", tmp_path / "a.tsv"]
    for file in own:
        file.write_text("mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors").write_text("mine")
    (tmp_path / "link").symlink_to(own[2])
    texts, pairs = f"text:{tmp_path}/*.txt", f"mix:0.5*pairs:{tmp_path}/a.tsv+0.5*text:{tmp_path}/none"
    for flag, target, data, model in (
        ("--json", own[0], texts, run), ("--json", own[1], texts, run), ("--tokens", own[2], texts, run),
        ("--json", tmp_path / "link", texts, run), ("--by-document", own[3], pairs, run),
        ("--json", folder / "model.safetensors", texts, folder), ("--json", own[2], f"text:{own[2]}", folder),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"{flag} .* is read by this command.*name another file"):
            command([str(model), flag, str(target), "--data", data])
    config = RunConfig(data=DataConfig(train="text:none", validation=(f"text:{tmp_path}/a,b.txt", "other=text:none")))
    own[0].write_text(config.to_json())
    with pytest.raises(InputError, match="--json .* is read by this command"):
        command([str(run), "--json", str(own[2])])
    own[0].write_text("mine")
    with pytest.raises(InputError, match="--compare names no model"):
        command([str(run), "--compare"])
    assert all(file.read_text() == "mine" for file in own)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "was not trained here, so it has no validation text: name a text with --data"),
        (["--window", "33"], "33 is more than the model's 32 learned positions"),
        (["--window", "8", "--stride", "9"], "stride 9 and window 8"),
        (["--window", "0"], "window 0: use 1 token or more"),
        (["--window", "8", "--batch-size", "0"], "batch_size is 0"),
    ],
)
def test_refused_before_anything_is_scored(command, model, arguments, message):
    data = ["--data", f"text:{model.path}/*.txt"] if "--window" in arguments else ["--window", "16"]
    with pytest.raises(InputError, match=message):
        command([str(model.path), *data, *arguments])


def test_a_window_past_the_positions_that_a_published_model_states(command, model, monkeypatch):
    rotary = dataclasses.replace(model.config.model, positions="rotary")
    published = Loaded(dataclasses.replace(model.config, model=rotary), model.params, model.tokenizer, None, model.path)
    monkeypatch.setattr(api, "load", lambda path, **_: published)
    with pytest.raises(InputError, match="window 33 is more than the 32 positions of"):
        command([str(model.path), "--data", f"text:{model.path}/*.txt", "--window", "33"])
    assert scored_text.window_and_stride(dataclasses.replace(published, step=1), 33, None) == (33, 33)


def test_a_harness_that_is_not_there(command, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install"):
        command(["x", "--harness", "piqa"])


def test_a_diverged_model_is_null_and_said_once(command, model, monkeypatch, tmp_path, capsys):
    broken = Loaded(model.config, jax.tree.map(lambda x: x * np.nan, model.params), model.tokenizer, None, tmp_path)
    monkeypatch.setattr(api, "load", lambda path, **_: broken)
    target = tmp_path / "result.json"
    command([str(tmp_path), "--data", f"text:{tmp_path}/*.txt", "--window", "16", "--json", str(target)])
    result = json.loads(target.read_text(encoding="utf-8"))
    assert result["nats"] is result["perplexity"] is result["bits_per_byte"] is result["standard_error"] is None
    assert result["tokens"] == 18
    said = capsys.readouterr()
    assert said.err.count("warning:") == 1 and "in 2 of 2 documents" in said.err
    assert "perplexity: -" in said.out
