"""What a run leaves: files and fields that notebooks and other programs read by these names."""

from __future__ import annotations

import json
import math
import shlex
import shutil

import pytest

import lm

from . import commands
from .conftest import STEPS

TRAINING = {"step", "tokens", "seconds"} | {
    f"train/{name}" for name in ("loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu")
}
EVALUATION = {"step", "eval/nats_per_token", "eval/perplexity", "eval/bits_per_byte"}


def test_files(finished):
    assert {path.name for path in finished.workdir.iterdir()} >= {
        "checkpoints", "config.json", "eval.json", "metrics.jsonl", "tokenizer.json",
    }  # fmt: skip
    newest = finished.workdir / "checkpoints" / str(STEPS)
    assert {path.name for path in newest.iterdir()} >= {
        "params", "opt_state", "rest", "config.json", "tokenizer.json", "manifest.json",
    }  # fmt: skip
    for name in ("config.json", "tokenizer.json"):
        assert (newest / name).read_bytes() == (finished.workdir / name).read_bytes()
    assert not [path for path in finished.workdir.rglob("*") if "tmp" in path.name], "something half-written is left"


def test_two_newest_checkpoints_and_the_best_are_kept(finished):
    best = min(commands.evaluations(finished.workdir), key=lambda record: record["eval/nats_per_token"])["step"]
    assert commands.steps(finished.workdir) == sorted({STEPS - 100, STEPS, best})


def test_the_first_line_of_metrics_is_the_start(finished):
    first, *others = commands.records(finished.workdir)
    assert first.keys() == {"start"} and not [record for record in others if "start" in record]
    start = first["start"]
    assert start.keys() >= {"versions", "devices", "mesh", "resumed_from"}
    assert start["versions"].keys() >= {"lm", "python", "jax"}
    assert len(start["devices"]) == 1 and math.prod(start["mesh"].values()) == 1
    assert start["resumed_from"] is None


def test_a_line_of_metrics_for_every_step(finished):
    training = [record for record in commands.records(finished.workdir) if "train/loss" in record]
    assert [record["step"] for record in training] == list(range(1, STEPS + 1))
    for record in training:
        assert record.keys() >= TRAINING
        assert record["tokens"] == record["step"] * 8 * 32
        assert record["train/tokens_per_second"] > 0
        assert record["train/mfu"] is None, "the peak of a CPU is not known"
    seconds = [record["seconds"] for record in training]
    assert seconds == sorted(seconds)
    rates = [record["train/learning_rate"] for record in training]
    assert rates[0] == pytest.approx(3e-3 / 10, rel=1e-6), "one of ten steps of warmup"
    assert max(rates) == pytest.approx(3e-3, rel=1e-6)
    assert training[0]["train/loss"] == pytest.approx(math.log(258), abs=0.1), "a fresh model knows nothing"
    assert training[-1]["train/loss"] < 2.5, "and this one has learned something"


def test_lines_of_evaluation(finished):
    evaluations = commands.evaluations(finished.workdir)
    assert [record["step"] for record in evaluations] == [300, 600]
    for record in evaluations:
        assert record.keys() >= EVALUATION
        assert record["eval/perplexity"] == pytest.approx(math.exp(record["eval/nats_per_token"]), rel=1e-9)


def test_the_config_is_the_one_that_ran(finished):
    config = json.loads((finished.workdir / "config.json").read_text(encoding="utf-8"))
    assert config["schema_version"] == 1
    assert config["training"]["steps"] == STEPS and config["model"]["vocab_size"] == 258
    assert lm.load(finished.workdir).config.training.steps == STEPS


def test_a_checkpoint_opens_when_copied_alone(finished, tmp_path):
    shutil.copytree(finished.workdir / "checkpoints" / str(STEPS), tmp_path / "elsewhere")
    run = lm.load(tmp_path / "elsewhere")
    assert run.step == STEPS
    assert lm.generate(run, ["the cat "], max_tokens=8, temperature=0.0) == lm.generate(
        lm.load(finished.workdir), ["the cat "], max_tokens=8, temperature=0.0
    )


def test_the_output_ends_with_a_command_that_works(finished):
    """The last line names the next commands, which are tried as they stand."""
    line = finished.result.stdout.strip().splitlines()[-1]
    evaluate, generate = line.removeprefix("next").split("   or   ")
    for command in (evaluate, generate):
        python, *arguments = shlex.split(command)
        assert python == "python"
        done = commands.succeed(arguments)
    prompt = arguments[-1]
    assert done.stdout.startswith(prompt) and len(done.stdout) > len(prompt) + 1
