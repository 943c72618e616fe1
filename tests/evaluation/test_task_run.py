"""A run that is evaluated on a task: in its loop, at its end, and again by eval.py, with the same numbers."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from sacrebleu.metrics import BLEU

import lm
from lm import api, checkpoint
from lm.checkpoint import Loaded
from lm.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    InputError,
    ModelConfig,
    ObserveConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from lm.training import run
from tests.end_to_end.commands import evaluations, records

ENGLISH = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
FRENCH = ["un", "deux", "trois", "quatre", "cinq", "six", "sept", "huit"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Two words each, to be translated one by one; some pairs are not trained on."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = [f"{ENGLISH[i]} {ENGLISH[j]}\t{FRENCH[i]} {FRENCH[j]}" for i in range(8) for j in range(8)]
    (folder / "train.tsv").write_text("\n".join(lines[::2] + lines[1::4]) + "\n", encoding="utf-8")
    (folder / "held.tsv").write_text("\n".join(lines[3::4]) + "\n", encoding="utf-8")
    return folder


def config_of(pairs, family="decoder", **changes):
    return RunConfig(
        model=ModelConfig(
            family=family, num_layers=2, d_model=32, num_heads=2, norm="rmsnorm", positions="rotary", d_ff=64
        ),
        data=DataConfig(
            train=f"pairs:{pairs}/train.tsv", validation=f"pairs:{pairs}/held.tsv", context=32, packing="padded",
            loader_threads=1,
        ),
        training=TrainingConfig(steps=12, batch_size=16),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=4, weight_decay=0.0),
        checkpoint=CheckpointConfig(keep=None),
        evaluation=EvaluationConfig(
            every_steps=12, task="translation", task_every_steps=6, task_documents=6, task_max_tokens=16, best="task"
        ),
        observe=ObserveConfig(sample_prompt=None),
        **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(pairs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    lm.train(config_of(pairs), workdir)
    return workdir


@pytest.fixture(scope="module", params=["decoder", "encoder_decoder"])
def of_each_family(request, pairs, tmp_path_factory):
    """Such a run of either family."""
    if request.param == "decoder":
        return request.getfixturevalue("trained")
    workdir = tmp_path_factory.mktemp("pair_runs") / "run"
    lm.train(config_of(pairs, request.param), workdir)
    return workdir


@pytest.fixture(scope="module")
def command():
    spec = importlib.util.spec_from_file_location("eval_of_tasks", Path(__file__).parents[2] / "eval.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.evaluate


def test_in_the_loop_and_at_the_end(of_each_family, pairs):
    trained = of_each_family
    both, task_alone = (
        [record for record in records(trained) if record.get("step") == 12 and "eval/bleu" in record],
        [record for record in records(trained) if record.get("step") == 6 and "eval/bleu" in record],
    )
    assert len(both) == len(task_alone) == 1 and "eval/nats_per_token" in both[0]
    assert "eval/nats_per_token" not in task_alone[0] and 0 <= task_alone[0]["eval/chrf"] <= 100
    assert len(evaluations(trained)) == 1
    manifest = checkpoint.read_manifest(checkpoint.locate(trained, "best"))
    assert manifest.metrics["eval/bleu"] == max(task_alone[0]["eval/bleu"], both[0]["eval/bleu"])
    sample = [json.loads(line) for line in (trained / "predictions" / "12.jsonl").read_text("utf-8").splitlines()]
    assert sorted(path.name for path in (trained / "predictions").iterdir()) == ["12.jsonl", "6.jsonl"]
    score = BLEU().corpus_score([each["prediction"] for each in sample], [[each["references"][0] for each in sample]])
    assert len(sample) == 6 and both[0]["eval/bleu"] == score.score
    result = json.loads((trained / "eval.json").read_text(encoding="utf-8"))["task"]
    written = [json.loads(line) for line in (trained / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert result["documents"] == len(written) == 16  # all, not the six of the loop
    held = (pairs / "held.tsv").read_text(encoding="utf-8").splitlines()
    assert [f"{each['source']}\t{each['references'][0]}" for each in written] == held
    score = BLEU().corpus_score([each["prediction"] for each in written], [[each["references"][0] for each in written]])
    assert result["metrics"]["bleu"] == score.score


def test_memory_that_has_gone_meanwhile_costs_the_task_and_not_the_run(pairs, tmp_path, monkeypatch, capsys):
    real = run.task_evaluator

    def failing_once(*arguments, **how):
        evaluator, asked = real(*arguments, **how), []

        def evaluate(loaded):
            asked.append(loaded)
            if len(asked) == 1:
                raise InputError("0.1 GB are free")
            return evaluator(loaded)

        return evaluate

    monkeypatch.setattr(run, "task_evaluator", failing_once)
    lm.train(config_of(pairs), tmp_path / "run")
    assert "step 6  the task is left out: 0.1 GB are free" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "run" / "predictions").iterdir()] == ["12.jsonl"]
    assert checkpoint.read_manifest(checkpoint.locate(tmp_path / "run", "best")).step == 12


def test_a_run_goes_on_with_its_task_when_the_checkpoint_it_began_from_is_gone(pairs, tmp_path, monkeypatch, capsys):
    """And the model that writes is of the step that it is at: a new run's cuts sources as a continued one's."""
    real, steps = run.task_evaluator, []

    def noting(*arguments, in_loop):
        evaluator = real(*arguments, in_loop=in_loop)

        def evaluate(loaded):
            steps.append(loaded.step)
            return evaluator(loaded)

        return evaluate if in_loop else evaluator

    monkeypatch.setattr(run, "task_evaluator", noting)
    config = config_of(pairs)
    often = dataclasses.replace(config.evaluation, task_every_steps=3, best="nats")
    config = dataclasses.replace(
        config, evaluation=often, checkpoint=dataclasses.replace(config.checkpoint, every_steps=3, keep=1)
    )
    for until in (6, 15):
        lm.train(dataclasses.replace(config, training=dataclasses.replace(config.training, steps=until)), tmp_path)
    assert 6 not in checkpoint.steps(tmp_path)
    assert "left out" not in capsys.readouterr().out
    assert steps == [3, 6, 9, 12, 15]


def test_a_complete_run_keeps_it_and_another_way_of_writing_is_done_anew(trained, pairs, capsys):
    kept = (trained / "eval.json").read_bytes()
    lm.train(config_of(pairs), trained)
    said = capsys.readouterr().out
    assert (trained / "eval.json").read_bytes() == kept and "complete" in said
    assert "translation BLEU" in said and said.count("reference  ") == said.count("output     ") == 5
    which = " --step best" if checkpoint.best_step(trained) == 6 else ""
    assert f"python eval.py {trained}{which} --task translation --num-beams 4" in said
    config = config_of(pairs)
    shorter = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, task_max_tokens=3))
    lm.train(shorter, trained)
    assert json.loads((trained / "eval.json").read_text(encoding="utf-8"))["task"]["protocol"]["max_tokens"] == 3
    lm.train(config, trained)
    assert json.loads((trained / "eval.json").read_text())["task"]["metrics"] == json.loads(kept)["task"]["metrics"]


def test_it_goes_on_by_pmap(trained, pairs, tmp_path):
    import shutil

    shutil.copytree(trained, tmp_path / "run")
    config = config_of(pairs, parallel=ParallelConfig(strategy="pmap"))
    lm.train(dataclasses.replace(config, training=TrainingConfig(steps=18, batch_size=16)), tmp_path / "run")
    assert [record["step"] for record in records(tmp_path / "run") if "eval/bleu" in record] == [6, 12, 18]


def test_eval_gives_the_same_and_the_files(command, of_each_family, pairs, tmp_path, capsys):
    trained = of_each_family
    where = ["--json", str(tmp_path / "result.json"), "--predictions", str(tmp_path / "written.jsonl")]
    command([str(trained), "--task", "translation", "--max-tokens", "16", *where])
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    final = json.loads((trained / "eval.json").read_text(encoding="utf-8"))
    assert result["nats"] == pytest.approx(final["nats"], rel=1e-6)
    for name in ("metrics", "confidence", "signatures", "documents", "unfinished", "tokens"):
        assert result["task"][name] == final["task"][name], name
    assert (tmp_path / "written.jsonl").read_bytes() == (trained / "predictions.jsonl").read_bytes()
    assert f"BLEU: {result['task']['metrics']['bleu']:.2f} (95 %: " in said and "signature BLEU: nrefs:1|" in said
    scores = lm.evaluate_task(lm.load(trained), "translation", f"pairs:{pairs}/held.tsv", max_tokens=16)
    assert scores.metrics()["eval/bleu"] == result["task"]["metrics"]["bleu"]


def test_a_model_without_finite_numbers_writes_something(command, of_each_family, tmp_path, monkeypatch, capsys):
    run = lm.load(of_each_family)
    broken = dataclasses.replace(run, params=jax.tree.map(lambda x: x * np.nan, run.params))
    monkeypatch.setattr(api, "load", lambda path, **_: broken)
    target = tmp_path / "result.json"
    for beams in ("1", "2"):
        command(["x", "--task", "translation", "--max-tokens", "4", "--num-beams", beams, "--json", str(target)])
        result = json.loads(target.read_text(encoding="utf-8"))
        assert result["nats"] is None and result["task"]["metrics"]["bleu"] == 0
        assert "warning:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-beams", "4"], "--num-beams is about what a model writes: add --task"),
        (["--predictions", "x"], "--predictions is about what a model writes"),
        (["--task", "translation", "--compare", "other"], "goes with no --compare"),
        (["--task", "translation", "--harness", "piqa"], "goes with no --harness"),
        (["--task", "translation", "--num-beams", "0"], "num_beams is 0"),
        (["--task", "translation", "--max-tokens", "0"], "max_tokens is 0"),
        (["--task", "translation", "--length-penalty", "0.6"], "length_penalty is 0.6, but a single beam"),
        (["--task", "translation", "--data", "text:TEXT"], "is one text, and no pair"),
    ],
)
def test_what_eval_refuses(command, trained, tmp_path, arguments, message):
    (tmp_path / "plain.txt").write_text("a text of one side", encoding="utf-8")
    arguments = [argument.replace("TEXT", str(tmp_path / "plain.txt")) for argument in arguments]
    with pytest.raises(InputError) as refused:
        command([str(trained), *arguments])
    assert message in str(refused.value)


@pytest.mark.parametrize("path", ["nowhere/out.jsonl", "."])
def test_predictions_that_cannot_be_written_are_refused_before_any_work(command, tmp_path, path, monkeypatch):
    monkeypatch.setattr(api, "load", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(InputError, match="--predictions .* in a folder that is there and can be written to"):
        command(["x", "--task", "translation", "--predictions", str(tmp_path / path)])


def test_what_is_missing_is_named_with_its_command_and_the_status_is_2(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name in ('sacrebleu', 'rouge_score') else find(name, *a)\n"
    )
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    for task, package in (("translation", "sacrebleu"), ("summarization", "rouge-score")):
        done = subprocess.run(
            [sys.executable, str(root / "eval.py"), "x", "--task", task],
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert f"pip install {package}" in done.stderr


def test_a_harness_is_of_decoders(command, pairs, monkeypatch):
    run = Loaded(config_of(pairs, "encoder_decoder"), {}, None, 1, Path("run"))
    monkeypatch.setattr(api, "load", lambda path, **_: run)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(InputError, match="run is an encoder_decoder, .* use --task on pairs"):
        command(["run", "--harness", "piqa"])


def test_what_a_run_refuses_before_it_begins(pairs, tmp_path):
    plain = tmp_path / "plain.txt"
    plain.write_text("a text of one side, long enough to be split into two parts\n" * 20, encoding="utf-8")
    good = config_of(pairs)

    def refused(message, **changes):
        sections = {
            section: dataclasses.replace(getattr(good, section), **fields) for section, fields in changes.items()
        }
        with pytest.raises(InputError, match=message):
            lm.train(dataclasses.replace(good, **sections), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    refused("is one text, and no pair", data={"train": f"text:{plain}", "validation": None})
    refused("num_beams is 130, which looks at 260 tokens a turn, and there are 258", evaluation={"task_beams": 130})
    refused("at a time x 129 beams, .* free: use fewer", evaluation={"task_beams": 129, "task_max_tokens": 10**8})
    refused("best is 'task', but evaluation.task is None", evaluation={"task": None, "task_every_steps": None})
    refused("best is 'task', but evaluation.task_every_steps is None", evaluation={"task_every_steps": None})
    refused("task_every_steps is 6, but evaluation.task is None", evaluation={"task": None, "best": "nats"})
    refused(
        "30 new tokens after .* 32 learned positions",
        model={"positions": "learned"},
        evaluation={"task_max_tokens": 30},
    )
