"""The task that a run is evaluated on, in the loop and at its end: translation or summarisation of validation pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from lm.config import InputError, RunConfig
from lm.evaluation.tasks import TaskEvaluator, TaskScores
from lm.evaluation.writing import Decoding
from lm.manifest import write_atomically
from lm.processes import hosts
from lm.training.texts import Validation, separator_of

PREDICTIONS = "predictions"


def task_evaluator(config: RunConfig, validation: Mapping[str, Validation], *, in_loop: bool) -> TaskEvaluator | None:
    """The evaluation of a run's task on its first validation text, in the loop on some of its pairs; None: no task.

    Raises InputError where it can't be done.
    """
    how = config.evaluation
    if how.task is None:
        return None
    split = config.parallel.fsdp * config.parallel.tensor
    if hosts.count() > 1 and split > 1:
        raise InputError(
            f"evaluation.task is {how.task!r}, whose texts one process writes, but parallel.fsdp and parallel.tensor "
            f"split the parameters into {split} parts over {hosts.count()} processes: set it to None, and score the "
            "checkpoints by eval.py --task"
        )
    return TaskEvaluator(
        how.task,
        next(iter(validation.values())).text,
        Decoding(how.task_max_tokens, how.task_beams, batch_size=how.batch_size),
        pair_separator=separator_of(config),
        documents=how.task_documents if in_loop else None,
    )


def keep_predictions(scores: TaskScores, workdir: Path, step: int | None = None) -> None:
    """Writes what a model wrote beside its references: RUN/predictions/STEP.jsonl, at the end RUN/predictions.jsonl."""
    path = workdir / f"{PREDICTIONS}.jsonl"
    if step is not None:
        path = workdir / PREDICTIONS / f"{step}.jsonl"
        path.parent.mkdir(exist_ok=True)
    write_atomically(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in scores.records()))
