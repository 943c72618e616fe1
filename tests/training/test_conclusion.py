"""The last lines of a run."""

from __future__ import annotations

import pytest

import lm
from lm.config import DataConfig, EvaluationConfig, ModelConfig, ObserveConfig, RunConfig, TrainingConfig


@pytest.mark.parametrize("prompt, tokens", [("t" * 20, 128), ("", 4)])
def test_a_sample_takes_the_positions_that_are_left(prompt, tokens, tmp_path, capsys):
    """Learned positions are few: what is drawn ends with them, and the run as any other."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} times two is {2 * number}. " for number in range(400)))
    config = RunConfig(
        model=ModelConfig(num_layers=1, d_model=16, num_heads=2, positions="learned", max_positions=24),
        data=DataConfig(train=f"text:{text}", context=16, loader_threads=1),
        training=TrainingConfig(steps=2, batch_size=8),
        evaluation=EvaluationConfig(every_steps=None),
        observe=ObserveConfig(sample_prompt=prompt, sample_tokens=tokens),
    )
    lm.train(config, tmp_path / "run")
    first = capsys.readouterr().out
    assert f"sample     {prompt!r} goes on" in first and "saved      " in first
    lm.train(config, tmp_path / "run")
    assert "complete" in capsys.readouterr().out
