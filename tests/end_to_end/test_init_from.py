"""Going on from another model's weights, in a run of its own."""

from __future__ import annotations

import jax
import numpy as np

import lm

from . import commands


def test_a_run_goes_on_from_another(finished, tmp_path):
    """Its first loss is the other's last; fields of the model come along; the same command continues it."""
    text = f"text:{commands.write_text(tmp_path / 'more.txt', seed=1)}"
    fields = {
        "data.train": text,
        "data.context": "32",
        "training.batch_size": "8",
        "training.steps": "6",
        "optimizer.learning_rate": "1e-9",
        "observe.sample_prompt": "None",
    }
    flags = [part for name, value in fields.items() for part in (f"--{name}", value)]
    new = ["train.py", "tiny", "--workdir", tmp_path / "new", "--init-from", finished.workdir, *flags]
    said = commands.succeed(new).stdout
    run, before = lm.load(tmp_path / "new"), lm.load(finished.workdir)
    assert run.config.model.d_model == before.config.model.d_model == 32
    assert run.config.model.positions == "learned" and run.config.model.dropout == 0
    for one, other in zip(jax.tree.leaves(run.params), jax.tree.leaves(before.params), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert run.tokenizer.sha256 == before.tokenizer.sha256
    (_, first), *_ = commands.losses(tmp_path / "new")
    assert first < 2, "new weights would begin at ln 258 = 5.6"
    assert f"weights    from {finished.workdir}" in said
    assert commands.succeed(new).stdout.splitlines()[-1].startswith("next")
    result = commands.run([*new, "--model.num-layers", "3"])
    assert result.status == 2 and "--model.num_layers can't be given with --init-from" in result.message
    other = commands.run([*new, "--optimizer.learning_rate", "1e-3"])
    assert other.status == 2 and f"--init-from {tmp_path / 'new'} takes over its weights" in other.message
    missing = commands.run(["train.py", "--workdir", tmp_path / "x", "--init-from", tmp_path / "nothing"])
    assert missing.status == 2 and str(tmp_path / "nothing") in missing.message
    assert not (tmp_path / "x").exists()
