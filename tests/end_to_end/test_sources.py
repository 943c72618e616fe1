"""Every kind of source, through `train.py` and `eval.py`, on files as they come from elsewhere."""

from __future__ import annotations

import gzip
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
import zstandard

import lm
import train
from lm.config import InputError
from lm.data import cache
from lm.data.sources import dataset
from lm.data.tokenizer import train_bpe

from . import commands

SENTENCES = [commands.sentence(seed) * (1 + seed % 5) for seed in range(120)]


class Sentences(tfds.core.GeneratorBasedBuilder):
    """A dataset of two languages, of a sort."""

    VERSION = tfds.core.Version("1.0.0")
    name = "sentences"
    pkg_dir_path = tfds.core.Path(__file__).parent
    code_path = tfds.core.Path(__file__)

    def _info(self):
        features = tfds.features.FeaturesDict({"en": tfds.features.Text(), "upper": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(SENTENCES[:100]), "test": self._generate_examples(SENTENCES[100:])}

    def _generate_examples(self, texts):
        yield from enumerate({"en": text, "upper": text.upper()} for text in texts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same sentences in every form."""
    here = tmp_path_factory.mktemp("sources")
    for n, text in enumerate(SENTENCES[:40]):
        (here / f"{n:02}.txt").write_text(text)
    (here / "all.txt.gz").write_bytes(gzip.compress("<|>".join(SENTENCES).encode()))
    lines = [json.dumps({"meta": {"text": text}}) for text in SENTENCES]
    (here / "all.jsonl.zst").write_bytes(zstandard.compress("\n".join(lines).encode()))
    pq.write_table(pa.table({"text": SENTENCES, "upper": [t.upper() for t in SENTENCES]}), here / "all.parquet")
    pairs = [f"{text.strip()}\t{text.strip().upper()}".replace("\n", " ") for text in SENTENCES]
    (here / "all.tsv").write_text("\n".join(pairs) + "\n")
    (here / "all.en").write_text("\n".join(text.replace("\n", " ") for text in SENTENCES) + "\n")
    (here / "all.up").write_text("\n".join(text.replace("\n", " ").upper() for text in SENTENCES) + "\n")
    tokenizer = train_bpe(SENTENCES, 300)
    tokenizer.save(here / "tokenizer.json")
    ids = [id for text in SENTENCES for id in (*tokenizer.encode(text), tokenizer.eos)]
    np.array(ids, np.uint16).tofile(here / "all.bin")
    dataset.prepare(Sentences(data_dir=str(cache.directory("tfds"))))
    return here


SOURCES = {
    "text": ("text:{}/[0-9]*.txt", {}),
    "text gz": ("text:{}/all.txt.gz", {"data__document_separator": "<|>"}),
    "tfds": ("tfds:sentences#en", {}),
    "jsonl zst": ("jsonl:{}/*.jsonl.zst#meta.text", {"data__packing": "padded"}),
    "parquet": ("parquet:{}/*.parquet", {"data__packing": "best_fit"}),
    "tokens": ("tokens:{}/*.bin", {"tokenizer__kind": "file", "tokenizer__path": "{}/tokenizer.json"}),
    "mix": ("mix:0.75*text:{}/[0-9]*.txt+0.25*jsonl:{}/all.jsonl.zst#meta.text", {"tokenizer__kind": "bpe"}),
    "pairs tsv": ("pairs:{}/all.tsv", {"data__packing": "best_fit"}),
    "pairs lines": ("pairs:{}/all.en,{}/all.up", {"data__prompt_loss": True}),
    "pairs tfds": ("pairs:tfds:sentences#en,upper", {}),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_each_kind_of_source_is_trained_on(kind, folder, tmp_path, capsys):
    source, changes = SOURCES[kind]
    changes = {name: str(value).replace("{}", str(folder)) for name, value in changes.items()}
    if "bpe" in changes.values():
        changes["tokenizer__vocab_size"] = 300
    fixed = {"training__steps": 10, "training__gradient_accumulation": 1, "model__num_layers": 1, "model__dropout": 0.0}
    _, *arguments = commands.train(source.replace("{}", str(folder)), tmp_path / "run", **{**fixed, **changes})
    train.train(arguments)
    losses = commands.losses(tmp_path / "run")
    assert [step for step, _ in losses] == [*range(1, 11)]
    assert losses[-1][1] < losses[0][1]
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert result["tokens"] > 100 and result["bits_per_byte"] > 0
    prompts = None if not kind.startswith("pairs") else "scored" if "lines" in kind else "context"
    assert result["protocol"].get("prompts") == prompts
    printed = capsys.readouterr().out
    mixed = re.search(r"mixture    7[3-6]\.\d\d % of the tokens from text:", printed)
    assert bool(mixed) == (kind == "mix")


def test_several_validation_sets_have_names(folder, tmp_path, capsys):
    _, *arguments = commands.train(
        f"text:{folder}/0*.txt",
        tmp_path / "run",
        training__steps=4,
        training__gradient_accumulation=1,
        evaluation__every_steps=2,
        model__num_layers=1,
    )
    arguments += ["--data.validation", f"near=text:{folder}/1*.txt", f"far=jsonl:{folder}/all.jsonl.zst#meta.text"]
    train.train(arguments)
    printed = capsys.readouterr().out
    for record in commands.evaluations(tmp_path / "run"):
        assert record["eval/nats_per_token"] == record["eval/near/nats_per_token"] != record["eval/far/nats_per_token"]
    assert "validation near loss" in printed and "far: perplexity" in printed
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    scored = tmp_path / "far.json"
    commands.succeed(["eval.py", tmp_path / "run", "--data", "far", "--json", scored])
    far = json.loads(scored.read_text())
    assert far["nats"] == pytest.approx(result["others"]["far"]["nats"], rel=1e-6)
    assert far["documents"] == 120 and result["documents"] == 10
    with pytest.raises(InputError, match=r"no validation text 'fra' \(did you mean 'far'\?\): it has far, near"):
        lm.evaluate(lm.load(tmp_path / "run"), "fra")


def test_a_source_can_be_looked_at(folder):
    said = commands.succeed(
        ["-m", "lm", "data", "inspect", f"parquet:{folder}/all.parquet", "--data.context", "64", "--rows", "2"]
    ).stdout
    size = sum(len(text.encode()) for text in SENTENCES)
    assert "documents:                120" in said and f"bytes:                    {size:,}" in said
    assert "bytes per token:          1.000" in said
    assert "row 0: 64 of 64 positions filled" in said and "piece 2" in said


def test_a_tokenizer_is_trained_and_used(folder, tmp_path):
    path = tmp_path / "own.json"
    source = f"text:{folder}/all.txt.gz"
    commands.succeed(
        [
            "-m",
            "lm",
            "tokenizer",
            "train",
            source,
            "--vocab-size",
            "320",
            "--special-tokens",
            "<|user|>",
            "--output",
            path,
        ]
    )
    said = commands.succeed(
        ["-m", "lm", "data", "inspect", source, "--tokenizer.kind", "file", "--tokenizer.path", path, "--rows", "0"]
    ).stdout
    assert "vocabulary:               320 (file)" in said
