"""How long a run lasts: in steps, tokens or epochs, all known beforehand as steps, or in seconds."""

from __future__ import annotations

import dataclasses
import math

from lm.config import TrainingConfig


@dataclasses.dataclass(frozen=True)
class Budget:
    """Exactly one of `steps` and `seconds` is set."""

    steps: int | None
    seconds: float | None
    warmup_steps: int

    @classmethod
    def of(cls, cfg: TrainingConfig, *, warmup_steps: int, tokens_per_step: int, rows_per_epoch: int) -> Budget:
        """The budget of a config, given the tokens of a batch and the rows of an epoch."""
        steps = cfg.steps
        if cfg.tokens is not None:
            steps = math.ceil(cfg.tokens / tokens_per_step)
        if cfg.epochs is not None:
            steps = math.ceil(cfg.epochs * rows_per_epoch / cfg.batch_size)
        return cls(steps, cfg.seconds, warmup_steps)

    def done(self, step: int, seconds: float) -> bool:
        """Whether `step` updates in `seconds` of training use it up."""
        if self.steps is not None:
            return step >= self.steps
        assert self.seconds is not None
        return seconds >= self.seconds

    def progress(self, step: int, seconds: float) -> float:
        """The part of the budget that is used up, 0 to 1: of the steps after the warmup, or of the seconds."""
        if self.steps is None:
            assert self.seconds is not None
            return min(seconds / self.seconds, 1.0)
        decaying = self.steps - self.warmup_steps
        return min(max(step - self.warmup_steps, 0) / decaying, 1.0) if decaying > 0 else 0.0
