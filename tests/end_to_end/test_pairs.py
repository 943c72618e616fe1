"""An encoder–decoder as a user meets it: trained on pairs, continued, scored, read again, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

import lm

from . import commands

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
FAMILY = {
    "model__family": "encoder_decoder",
    "model__share_embeddings": False,
    "source_tokenizer__kind": "bytes",
    "tokenizer__kind": "bpe",
    "tokenizer__vocab_size": 300,
    "data__packing": "best_fit",
    "data__source_context": 24,
    "data__context": 32,
    "optimizer__learning_rate": 1e-2,
    "optimizer__schedule": "constant",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Numbers and how they are read, digit by digit."""
    folder = tmp_path_factory.mktemp("numbers")
    numbers = [f"{n:03d}" for n in range(1000)]
    lines = [f"{number}\t{' '.join(DIGITS[int(digit)] for digit in number)}\n" for number in numbers]
    (folder / "held.tsv").write_text("".join(lines[::20]), encoding="utf-8")
    np.arange(99, dtype=np.uint16).tofile(folder / "ids.bin")
    (folder / "train.tsv").write_text("".join(x for n, x in enumerate(lines) if n % 20), encoding="utf-8")
    return folder


def arguments(text, workdir, **changes):
    fields = {**FAMILY, "data__validation": f"pairs:{text}/held.tsv", "training__steps": 30, **changes}
    return commands.train(f"pairs:{text}/train.tsv", workdir, **fields)


def test_train_continue_and_evaluate(text, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    said = commands.succeed(arguments(text, whole)).stdout
    assert "950 pairs" in said and "an epoch, of 24 source tokens" in said
    first, *_, last = [loss for _, loss in commands.losses(whole)]
    assert first > 5 and last < 3, "ln 300 is 5.7; the words are ten"
    commands.succeed(arguments(text, parts, training__steps=12))
    again = commands.succeed(arguments(text, parts, parallel__strategy="pmap"), devices=4).stdout
    assert "resuming from step 12" in again
    for (_, one), (_, other) in zip(commands.losses(whole), commands.losses(parts), strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    run = lm.load(whole)
    assert run.tokenizer.vocab_size != 258 == run.source_tokenizer.vocab_size
    kept = json.loads((whole / "eval.json").read_text(encoding="utf-8"))
    assert lm.evaluate(run).nats == pytest.approx(kept["nats"], rel=1e-5)
    tokens = tmp_path / "tokens.jsonl"
    held = ["--data", f"pairs:{text}/held.tsv"]
    scored = commands.succeed(["eval.py", whole, *held, "--json", tmp_path / "e.json", "--tokens", tokens])
    assert "protocol start" in scored.stdout
    assert json.loads((tmp_path / "e.json").read_text())["nats"] == pytest.approx(kept["nats"], rel=1e-5)
    each = [json.loads(line) for line in tokens.read_text(encoding="utf-8").splitlines()]
    assert ["".join(one["pieces"]) for one in each][:2] == ["zero zero zero", "zero two zero"]
    assert sum(sum(one["nats"]) for one in each) == pytest.approx(kept["nats"], rel=1e-5)
    logits = run(np.array([[run.config.model.start_id, 5]]), source=np.array([[49, 50, 51, 257]]))
    assert logits.shape == (1, 2, run.config.model.padded_vocabulary)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__train": "tokens:{}/ids.bin"}, "is ready ids, which are no pairs: an encoder_decoder needs them"),
        ({"data__train": "text:README.md"}, "is no pair but one text, and an encoder_decoder needs a source"),
        ({"data__packing": "split"}, "data.packing"),
        ({"training__label_smoothing": 1.0}, "training.label_smoothing is 1.0"),
        ({"data__max_length_ratio": 0.5}, "data.max_length_ratio is 0.5"),
        ({"model__share_embeddings": True}, "source_tokenizer.kind"),
        ({"model__start_id": 4000}, "model.start_id is 4000"),
    ],
)
def test_wrong_input_is_named(text, tmp_path, changes, message):
    changes = {name: str(value).replace("{}", str(text)) for name, value in changes.items()}
    result = commands.run(arguments(text, tmp_path / "run", **changes))
    assert result.status == 2, result.stderr
    assert message in result.message
    assert not (tmp_path / "run").exists()


def test_pairs_of_unequal_length_and_empty_sides(text, tmp_path):
    (tmp_path / "a.en").write_text("one\ntwo\nthree\n")
    (tmp_path / "a.fr").write_text("un\ndeux\n")
    result = commands.run(arguments(text, tmp_path / "run", data__train=f"pairs:{tmp_path}/a.en,{tmp_path}/a.fr"))
    assert result.status == 2 and "a.en has 3 lines and" in result.message and "a.fr has 2" in result.message
    (tmp_path / "b.tsv").write_text("one\tun\n\tdeux\n")
    result = commands.run(arguments(text, tmp_path / "run", data__train=f"pairs:{tmp_path}/b.tsv"))
    assert result.status == 2 and "b.tsv, line 2: the first (source) side of the pair is empty" in result.message
