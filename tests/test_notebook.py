"""notebooks/restore.ipynb runs from top to bottom on a fresh run, and what it shows is right."""

from __future__ import annotations

import base64
import dataclasses
import os
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

import lm

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "restore.ipynb"
TEXT = "".join(f"def area_{n}(width, height):\n    return {n} * width * height\n\n\n" for n in range(400))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A small run on a small text."""
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    cfg = lm.preset("tiny")
    cfg = dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, num_layers=1, d_model=32, num_heads=2),
        tokenizer=dataclasses.replace(cfg.tokenizer, kind="bytes"),
        data=dataclasses.replace(cfg.data, train=f"text:{folder}/text.txt", context=64),
        training=dataclasses.replace(cfg.training, steps=60, batch_size=8),
        optimizer=dataclasses.replace(cfg.optimizer, warmup_steps=5, learning_rate=1e-2),
        evaluation=dataclasses.replace(cfg.evaluation, every_steps=20),
    )
    lm.train(cfg, folder / "small")
    return folder / "small"


@pytest.fixture(scope="module")
def shown(workdir) -> dict[str, tuple[str, list[bytes]]]:
    """The text and the pictures that each cell shows, by the cell's id, in a kernel with one device."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook, kernel_name="python3", timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_NUM")}
    client.execute(env={**kept, "LM_RUN": str(workdir), "JAX_PLATFORMS": "cpu"})
    return {cell.id: _shown(cell) for cell in notebook.cells if cell.cell_type == "code"}


def _shown(cell) -> tuple[str, list[bytes]]:
    text = "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")
    assert not [output for output in cell.outputs if output.output_type == "stream" and output.name == "stderr"], cell
    data = [output.data for output in cell.outputs if output.output_type == "display_data"]
    return text, [base64.b64decode(item["image/png"]) for item in data if "image/png" in item]


def test_perplexity_is_the_evaluations(shown, workdir):
    scores = lm.evaluate(lm.load(workdir))
    text, _ = shown["perplexity"]
    # This process has eight devices, the kernel one: rounding, besides that of the three decimals.
    assert float(re.search(r"perplexity +([\d.]+)", text)[1]) == pytest.approx(scores.perplexity, abs=1.1e-3)
    assert float(re.search(r"([\d.]+) bits a byte", text)[1]) == pytest.approx(scores.bits_per_byte, abs=1.1e-4)
    assert f"documents: 1, tokens: {scores.tokens:,}" in text


def test_parameters_are_all_listed(shown, workdir):
    run = lm.load(workdir)
    *lines, total = shown["parameters"][0].splitlines()
    counts = [int(line.split()[-1].replace(",", "")) for line in lines]
    assert sum(counts) == run.num_parameters == int(total.split()[-1].replace(",", ""))
    assert any(line.startswith("layers/attention/qkv ") for line in lines)
    assert f"step 60, {run.num_parameters:,} parameters" in shown["load"][0]
    assert re.search(r"^d_model +32$", shown["config"][0], re.MULTILINE)


def test_text_is_sampled(shown, workdir):
    run = lm.load(workdir)
    texts = lm.generate(run, ["def "] * 2, max_tokens=32, temperature=0.8, top_p=0.95, seed=0)
    assert all("def " + text in shown["sample"][0] for text in texts)


def test_loss_curve_is_drawn(shown):
    _, pictures = shown["curve"]
    assert len(pictures) == 1
    assert pictures[0].startswith(b"\x89PNG")
    assert len(pictures[0]) > 10_000  # an empty pair of axes is smaller


def test_most_probable_tokens_are_the_models(shown, workdir):
    run = lm.load(workdir)
    ids = np.concatenate([[run.tokenizer.first_id], run.tokenizer.encode("for name in sorted(names):")])
    best = run.tokenizer.decode([int(np.argmax(run(ids[None])[0, -1]))])
    assert shown["logits"][0].splitlines()[-1].split(maxsplit=1)[1].startswith(repr(best))


def test_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)
