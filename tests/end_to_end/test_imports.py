"""TensorFlow and torch are never needed: a whole course of training, evaluating and generating imports neither."""

from __future__ import annotations

import pytest

from . import commands

SESSION = """
import sys
import lm, train, eval
train.train(sys.argv[2:])
eval.evaluate([sys.argv[1], "--json", sys.argv[1] + "/scores.json"])
print(lm.generate(lm.load(sys.argv[1]), ["the cat"], max_tokens=4))
print("MODULES", *sys.modules)
"""


@pytest.mark.parametrize("text", ["text", "builtin"])
def test_neither_tensorflow_nor_torch(text, source, tmp_path):
    train = source if text == "text" else "builtin:python-stdlib"
    # of the built-in corpus only a little is evaluated: its own text stands in for it
    arguments = commands.train(
        train, tmp_path / "run", data__validation=source, model__num_layers=1, training__steps=2,
        observe__sample_prompt="the", observe__sample_tokens=4,
    )  # fmt: skip
    done = commands.succeed(["-c", SESSION, str(tmp_path / "run"), *arguments[1:]])
    modules = {name.split(".")[0] for name in done.stdout.split("MODULES ")[1].split()}
    assert {"jax", "optax", "orbax", "lm"} <= modules
    assert ("tensorflow_datasets" in modules) == (text == "builtin")
    assert not modules & {"tensorflow", "torch", "transformers", "keras"}


def test_importing_lm_is_quick():
    """`import lm` alone imports nothing heavy: its names are found when they are first used."""
    done = commands.succeed(["-c", "import lm, sys; print(*sys.modules)"])
    assert not {name.split(".")[0] for name in done.stdout.split()} & {"jax", "flax", "orbax", "tensorflow", "torch"}
