"""The user's mistakes end in one message that names the thing and the way out, with status 2, and nothing is lost.

No traceback, nothing compiled, nothing written: neither a new run directory nor a byte of one that is there.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest

from . import commands


@dataclasses.dataclass(frozen=True)
class Case:
    """`arguments` come after those of a tiny run, or, if they begin with a command, in their place.

    `said` are regular expressions. {tmp} is a folder with what `files` makes, {run} a finished run.
    """

    name: str
    arguments: str
    said: tuple[str, ...]
    devices: int = 1
    workdir: str = "{tmp}/run"

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("unknown preset", "train.py tinny --workdir {tmp}/run", ("'tinny'", "did you mean 'tiny'")),
    Case("unknown field", "--model.d-modle 64", ("d-modle", "--model.d-model")),
    Case("text for a number", "--training.batch-size many", ("training.batch-size", "many", "INT")),
    Case("number for a truth value", "--model.bias 3", ("model.bias", "True", "False")),
    Case("unknown choice", "--model.positions rotory", ("model.positions", "rotory", "rotary")),
    Case("empty file", "--data.train text:{tmp}/empty.txt", ("empty.txt", "is empty")),
    Case("missing file", "--data.train text:{tmp}/missing.txt", ("missing.txt", "matches no file")),
    Case("missing validation file", "--data.validation text:{tmp}/missing.txt", ("missing.txt", "matches no file")),
    Case("unknown kind of source", "--data.train txet:{tmp}/short.txt", ("txet", "did you mean 'text'")),
    Case("not UTF-8", "--data.train text:{tmp}/latin1.txt", ("latin1.txt", "not UTF-8", "0xe9", "iconv")),
    Case("shorter than a row", "--data.train text:{tmp}/short.txt", ("short.txt", "less than one row", "context")),
    Case(
        "batch that the mesh doesn't divide",
        "--training.batch-size 12 --training.gradient-accumulation 1",
        ("training.batch_size 12", "8 devices", "8 or 16"),
        devices=8,
    ),
    Case(
        "batch that the micro-batches don't divide",
        "--training.batch-size 9",
        ("training.gradient_accumulation 2", "training.batch_size 9"),
    ),
    Case("heads that don't divide the width", "--model.num-heads 5", ("model.num_heads 5", "model.d_model 32")),
    Case(
        "attention of another device",
        "--model.attention cudnn --model.compute-dtype bfloat16 --model.dropout 0",
        ("model.attention is 'cudnn'", "this is a cpu", "'auto'"),
    ),
    Case("attention without dropout", "--model.attention blockwise", ("'blockwise'", "model.dropout 0.1", "'auto'")),
    Case("mesh that doesn't fit the devices", "--parallel.fsdp 3", ("fsdp 3", "1 device")),
    Case(
        "width that the mesh doesn't divide",
        "--model.d-model 20 --parallel.fsdp 8 --training.batch-size 16",
        ("20", "8 devices", "fsdp"),
        devices=8,
    ),
    Case("two budgets", "--training.tokens 1000 --training.seconds 5", ("exactly one", "tokens", "seconds")),
    Case("no budget", "--training.steps None", ("exactly one", "training.steps", "none")),
    Case("tokenizer file without a path", "--tokenizer.kind file", ("tokenizer.kind", "tokenizer.path")),
    Case("missing tokenizer", "--tokenizer.kind file --tokenizer.path {tmp}/none.json", ("none.json", "no tokenizer")),
    Case("learning rate that is no number", "--optimizer.learning-rate nan", ("optimizer.learning_rate", "nan")),
    Case("stride over the window", "--evaluation.window 16 --evaluation.stride 17", ("stride 17", "window 16")),
    Case("window over the positions", "--evaluation.window 64", ("64", "32 learned positions")),
    Case("sample prompt over the positions", f"--observe.sample-prompt {'a' * 40}", ("observe.sample_prompt", "32")),
    Case("workdir that can't be made", "", ("/dev/null/run", "--workdir"), workdir="/dev/null/run"),
    Case("another config", "--optimizer.beta1 0.5", (r"optimizer\.beta1: 0.9 .*0.5", "--workdir"), workdir="{run}"),
    Case("workdir is a file", "", ("short.txt", "is a file", "--workdir"), workdir="{tmp}/short.txt"),
    Case("workdir holds other files", "", ("other files", "--workdir"), workdir="{tmp}"),
    Case("missing preset file", "train.py {tmp}/none.py", ("none.py",)),
    Case("preset without get_config", "train.py {tmp}/preset.py --workdir {tmp}/run", ("preset.py", "get_config")),
    Case("evaluating what is no run", "eval.py {tmp}", ("{tmp}", "not a run")),
    Case("evaluating a step that is not there", "eval.py {run} --step 7", ("7", "600")),
    Case("evaluating without a model", "eval.py", ("required",)),
    Case("evaluating a missing text", "eval.py {run} --data text:{tmp}/missing.txt", ("missing.txt", "no file")),
    Case("evaluating with stride over window", "eval.py {run} --window 8 --stride 9", ("stride 9", "window 8")),
    Case("evaluating with a window of 0", "eval.py {run} --window 0", ("window", "0")),
    Case("evaluating with a stride of 0", "eval.py {run} --stride 0", ("stride", "0")),
    Case("evaluating no windows at a time", "eval.py {run} --batch-size 0", ("batch.size", "0")),
    Case(
        "result to a folder that isn't there",
        "eval.py {run} --json {tmp}/none/x.json",
        ("{tmp}/none", "folder|directory"),
    ),
    Case("evaluating past the positions", "eval.py {run} --window 33", ("window 33", "32 learned positions")),
    Case("generating from what is no run", "-m lm generate {tmp}", ("{tmp}", "not a run")),
    Case("generating past the positions", "-m lm generate {run} --max-tokens 40", ("40", "32 learned positions")),
    Case("generating nothing", "-m lm generate {run} --max-tokens 0", ("max_tokens is 0",)),
    Case("no samples", "-m lm generate {run} --samples 0", ("samples", "0")),
    Case("infinite temperature", "-m lm generate {run} --max-tokens 8 --temperature inf", ("temperature is inf",)),
    Case("seed of many digits", "-m lm generate {run} --max-tokens 8 --seed 99999999999999999999", ("seed", "9999")),
    Case("temperature below zero", "-m lm generate {run} --temperature -1", ("temperature is -1",)),
    Case("unknown subcommand", "-m lm genrate {run}", ("'genrate'", "did you mean 'generate'")),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder of things that can't be trained on."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "short.txt").write_text("Short.")
    (folder / "latin1.txt").write_bytes("un café\n".encode("latin-1") * 100)
    (folder / "preset.py").write_text("CONFIG = 1\n")
    return folder


@pytest.fixture(scope="module")
def ended(request, files, finished, long_run, tmp_path_factory):
    """{case: (folder it could write to, that folder before, how the process ended)}, of the cases asked for."""
    asked = [item.callspec.params["case"] for item in request.session.items if "case" in _parameters(item)]

    def run(case):
        folder = tmp_path_factory.mktemp("case") / "files"
        shutil.copytree(files, folder)
        places = {"tmp": folder, "run": finished.workdir}
        before = commands.contents(folder)
        arguments = case.arguments.format(**places).split()
        if case.arguments.startswith("--") or not case.arguments:
            arguments = long_run(Path(case.workdir.format(**places))) + arguments
        return folder, before, commands.run(arguments, devices=case.devices, JAX_LOG_COMPILES="1")

    results = commands.at_once(*(lambda case=case: run(case) for case in asked))
    return dict(zip(asked, results, strict=True))


@pytest.fixture(scope="module")
def untouched(finished):
    return commands.contents(finished.workdir)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_status_2_and_one_message(untouched, ended, finished, case):
    folder, before, result = ended[case]
    assert result.status == 2, f"status {result.status}: {result.message}"
    assert "Traceback" not in result.stderr and "Traceback" not in result.stdout
    for pattern in case.said:
        pattern = pattern.format(tmp=re.escape(str(folder)))
        assert re.search(pattern, result.message), f"{pattern!r} is not in: {result.message}"
    assert len(re.findall("^error: |^╭", result.stderr, re.MULTILINE)) == 1, f"not one message: {result.message}"
    assert result.stdout == "", "nothing is announced that doesn't happen"
    compiled = re.findall(r"Compiling (\S+)", result.stderr)
    assert not compiled, f"compiled {compiled} first"
    assert commands.contents(folder) == before, "wrote something"
    assert commands.contents(finished.workdir) == untouched, "changed a run that was there"


def _parameters(item) -> dict:
    return item.callspec.params if hasattr(item, "callspec") else {}
