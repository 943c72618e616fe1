"""eval.py, lm.evaluate and the evaluations of a run are one function: the same text, the same number."""

from __future__ import annotations

import json
import math

import pytest

import lm

from . import commands

KEYS = {"nats", "tokens", "words", "bytes", "documents", "nats_per_token", "perplexity", "word_perplexity"} | {
    "bits_per_byte", "standard_error", "protocol", "model", "seconds", "tokens_per_second",
}  # fmt: skip
PROTOCOL = {"window", "stride", "bos", "eos", "data", "data_sha256", "tokenizer_sha256", "words", "bytes"}
# {name: (arguments, devices)}
CALLS = {
    "plain": ([], 1),
    "batch 1": (["--batch-size", "1"], 1),
    "batch 7": (["--batch-size", "7"], 1),
    "batch 64": (["--batch-size", "64"], 1),
    "eight devices": ([], 8),
    "sliding": (["--window", "16", "--stride", "4"], 1),
}


@pytest.fixture(scope="module")
def results(finished, tmp_path_factory):
    """{call: what eval.py --json wrote}, and what the plain call printed."""
    folder = tmp_path_factory.mktemp("evaluations")

    def evaluate(name):
        arguments, devices = CALLS[name]
        file = folder / f"{name}.json"
        done = commands.succeed(["eval.py", str(finished.workdir), "--json", str(file), *arguments], devices=devices)
        return json.loads(file.read_text(encoding="utf-8")) | {"printed": done.stdout}

    before = commands.contents(finished.workdir)
    found = commands.at_once(*(lambda name=name: evaluate(name) for name in CALLS))
    assert commands.contents(finished.workdir) == before, "evaluating changed the run"
    return dict(zip(CALLS, found, strict=True))


def test_keys_and_ratios(results, source):
    plain = results["plain"]
    assert plain.keys() >= KEYS and plain["protocol"].keys() >= PROTOCOL
    assert plain["model"].keys() >= {"path", "step", "parameters"}
    text = open(source.removeprefix("text:"), encoding="utf-8").read()  # noqa: SIM115, PTH123
    held_out = text[len(text) * 9 // 10 :]
    assert plain["tokens"] == plain["bytes"] == len(held_out.encode()), "bytes are tokens, and BOS lets all be scored"
    assert plain["words"] == len(held_out.split()) and plain["documents"] == 1
    assert plain["standard_error"] is None, "one document has none"
    assert plain["nats_per_token"] == plain["nats"] / plain["tokens"]
    assert plain["perplexity"] == pytest.approx(math.exp(plain["nats"] / plain["tokens"]), rel=1e-12)
    assert plain["word_perplexity"] == pytest.approx(math.exp(plain["nats"] / plain["words"]), rel=1e-12)
    assert plain["bits_per_byte"] == pytest.approx(plain["nats"] / plain["bytes"] / math.log(2), rel=1e-12)
    assert plain["model"]["step"] == 600 and plain["protocol"]["window"] == plain["protocol"]["stride"] == 32


def test_the_number_is_that_of_the_run_and_of_python(results, finished):
    plain = results["plain"]
    in_loop = commands.evaluations(finished.workdir)[-1]
    at_end = json.loads((finished.workdir / "eval.json").read_text(encoding="utf-8"))
    scores = lm.evaluate(lm.load(finished.workdir))
    assert in_loop["step"] == at_end["model"]["step"] == 600
    # 1e-6: the batches differ in size, and the last evaluation here runs on other devices
    for nats_per_token in (in_loop["eval/nats_per_token"], at_end["nats_per_token"], scores.nats_per_token):
        assert plain["nats_per_token"] == pytest.approx(nats_per_token, rel=1e-6)
    assert scores.to_dict()["protocol"] == plain["protocol"] == at_end["protocol"]
    assert f"{plain['perplexity']:.3f}" in finished.result.stdout
    assert f"{plain['perplexity']:.6g}" in plain["printed"]


@pytest.mark.parametrize("name", ["batch 1", "batch 7", "batch 64", "eight devices"])
def test_batch_size_and_devices_change_nothing(results, name):
    """1e-6: float32 sums in another order."""
    one, other = results["plain"], results[name]
    assert other["nats_per_token"] == pytest.approx(one["nats_per_token"], rel=1e-6)
    assert other["protocol"] == one["protocol"]
    for count in ("tokens", "words", "bytes", "documents"):
        assert other[count] == one[count]


def test_window_and_stride_are_another_protocol(results):
    plain, sliding = results["plain"], results["sliding"]
    assert (sliding["protocol"]["window"], sliding["protocol"]["stride"]) == (16, 4)
    assert sliding["tokens"] == plain["tokens"], "every token is scored once, whatever the windows"
    assert abs(sliding["nats_per_token"] / plain["nats_per_token"] - 1) > 1e-4, "the windows were ignored"


def test_comparison_documents_and_tokens(results, finished, source, tmp_path):
    """An earlier checkpoint beside the last one, on a text of several documents, EOS scored too."""
    names = ("json", "by-document", "tokens")
    files = {name: tmp_path / name for name in names}
    earlier = finished.workdir / "checkpoints" / str(commands.steps(finished.workdir)[0])
    texts = tmp_path / "texts"
    texts.mkdir()
    for number, text in enumerate(["a dog sees the moon; ", "", "nobody 👩‍🚀 hears 猫. " * 5, "x"]):
        (texts / f"{number}.txt").write_text(text, encoding="utf-8")
    flags = [part for name in names for part in (f"--{name}", str(files[name]))]
    done = commands.succeed(
        ["eval.py", str(finished.workdir), "--data", f"text:{texts}/*.txt", "--score-eos", "True"]
        + ["--compare", str(earlier), *flags]
    )
    result = json.loads(files["json"].read_text(encoding="utf-8"))
    documents, tokens = (
        [json.loads(line) for line in files[name].read_text(encoding="utf-8").splitlines()] for name in names[1:]
    )
    assert result["protocol"]["eos"] == 257 and result["tokens"] == result["bytes"] + 3
    assert len(documents) == len(tokens) == result["documents"] == 3
    assert math.fsum(each["nats"] for each in documents) == result["nats"]
    for name in ("tokens", "words", "bytes"):
        assert sum(each[name] for each in documents) == result[name]
    for document, each in zip(documents, tokens, strict=True):
        assert document["id"] == each["id"] and document["tokens"] == len(each["nats"])
        assert sum(each["nats"]) == pytest.approx(document["nats"], rel=1e-6)
    assert "".join(tokens[1]["pieces"]) == "nobody 👩‍🚀 hears 猫. " * 5
    first, second = result["comparison"]["models"]
    (pair,) = result["comparison"]["pairs"]
    assert first["nats"] == result["nats"] and second["path"] == str(earlier)
    assert pair["unit"] == "nats per token" and pair["standard_error"] > 0
    assert pair["difference"] == pytest.approx(second["nats_per_token"] - first["nats_per_token"])
    assert f"2 - 1\t{pair['difference']:+.6g}" in done.stdout
