"""One run from its start to the end of its budget: state, compiled step, evaluator and checkpoints around the loop."""

from __future__ import annotations

import contextlib
import json
import math
import platform
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from lm import allocator, checkpoint, compilation
from lm.checkpoint import CheckpointWriter, Loaded
from lm.config import InputError, RunConfig
from lm.data.pairs import PairStore
from lm.data.pipeline import Batch
from lm.evaluation.pairs import PairEvaluator
from lm.evaluation.perplexity import Evaluator, Scores
from lm.manifest import read_manifest
from lm.parallel import make_mesh, own_rows, put_rows
from lm.processes import hosts
from lm.run_directory import criterion
from lm.sharded_attention import choice
from lm.training import loop, transfers
from lm.training.flops import flops_per_token, peak_flops
from lm.training.lowering import lower_step, optimizer_on
from lm.training.profile import traced
from lm.training.replicated import on_mesh, put_replicas
from lm.training.signals import StopRequest
from lm.training.start import Start
from lm.training.state import TrainState, abstract_state, create_state, state_of
from lm.training.task import keep_predictions, task_evaluator
from lm.training.texts import Say


def run(start: Start, workdir: Path, *, write: Callable[[dict[str, Any]], None], say: Say, stop: StopRequest) -> None:
    """Trains until the budget is used up or a stop is requested. The last state then lies in a checkpoint.

    Args:
      write: takes one record of metrics at a time; the first is {"start": ...}.
      say: takes a line for the user.
    """
    cfg = start.config
    mesh = make_mesh(cfg.parallel)
    optimizer = optimizer_on(cfg, mesh)
    state, seconds = _initial_state(start, optimizer, mesh)
    step = start.step
    if start.budget.done(step, seconds):
        return
    say(f"resuming from step {step}" if start.resume_from else f"starting   a new run in {workdir}")
    if (note := allocator.note()) is not None:
        say(note)
    run_step = transfers.placing_progress(_compile(start, optimizer, mesh, say), mesh)
    with (
        CheckpointWriter(
            workdir,
            config=cfg,
            save_tokenizer=start.save_tokenizers,
            provenance=start.provenance,
            keep=cfg.checkpoint.keep,
        ) as checkpoints,
        traced(run_step, workdir, say) if cfg.observe.profile else contextlib.nullcontext(run_step) as run_step,
        transfers.none_hidden(mesh),
    ):
        write({"start": _describe(start, mesh)})  # after the config is there: what has metrics is a run

        @transfers.freely
        def save(step: int, state: TrainState, seconds: float, metrics: dict[str, float]) -> None:
            checkpoints.save(step, on_mesh(state, mesh).items(np.float64(seconds)), metrics)

        peak = peak_flops(mesh.devices.flat[0])
        state, *_ = loop.train(
            state,
            step,
            seconds,
            _best_cost(workdir, cfg),
            cfg=cfg,
            budget=start.budget,
            hands=loop.Hands(
                run_step,
                _batches(start, step, mesh),
                _evaluate(start, mesh, say),
                save,
                write,
                checkpoints.wait,
                _evaluate_task(start, mesh, workdir, say),
            ),
            tokens_per_step=start.pipeline.tokens_per_step,
            flops_per_token=flops_per_token(cfg.model, cfg.data.context, cfg.data.source_length),
            peak_flops=None if peak is None else peak * mesh.size,
            stop=stop,
        )
        skipped = int(jax.device_get(state.skipped.total))
        if skipped:
            say(f"skipped    {skipped} steps, whose loss or gradients were not finite numbers")


def _evaluate(start: Start, mesh: Mesh, say: Say) -> Callable[[Any], dict[str, Scores]]:
    """The evaluation in the loop, of all validation texts by their names."""
    evaluators = {name: evaluator(start, name, mesh, in_loop=True) for name in start.validation}

    @transfers.freely
    def evaluate(params: Any) -> dict[str, Scores]:
        with compilation.said("the evaluation", say):
            return {name: each(on_mesh(params, mesh)) for name, each in evaluators.items()}

    return evaluate


def _evaluate_task(start: Start, mesh: Mesh, workdir: Path, say: Say) -> Callable[[int, Any], dict[str, float]]:
    """The evaluation of the run's task in the loop, as metrics: the first process's, which writes alone.

    What was written is kept, a file a step.
    """
    evaluator = task_evaluator(start.config, start.validation, in_loop=True)

    @transfers.freely
    def evaluate(step: int, params: Any) -> dict[str, float]:
        assert evaluator is not None, "validated: without a task it is never due"
        found: dict[str, float] = {}
        if hosts.is_first():
            try:
                with compilation.said("the task", say):
                    scores = evaluator(_loaded(start, on_mesh(params, mesh), step))
            except InputError as error:  # memory that was there when the run was checked: no reason to lose it
                say(f"step {step}  the task is left out: {error}")
            else:
                keep_predictions(scores, workdir, step)
                found = scores.metrics()
        return json.loads(hosts.agree("the task", json.dumps(found)))

    return evaluate


def _loaded(start: Start, params: Any, step: int) -> Loaded:
    """The model of a run that is under way."""
    return Loaded(start.config, params, start.tokenizer, step, Path(), start.source_tokenizer)


def evaluator(start: Start, name: str, mesh: Mesh, *, in_loop: bool) -> Evaluator | PairEvaluator:
    """The evaluation of one of a run's validation texts; in the loop it may take only part of it."""
    cfg, store = start.config, start.validation[name].store
    max_tokens = cfg.evaluation.max_tokens if in_loop else None
    if isinstance(store, PairStore):
        return PairEvaluator(
            cfg.model,
            store,
            start.tokenizer,
            start.source_tokenizer,
            batch_size=cfg.evaluation.batch_size,
            mesh=mesh,
            rules=cfg.parallel.rules,
            max_tokens=max_tokens,
        )
    window = cfg.evaluation.window or cfg.data.context
    return Evaluator(
        cfg.model,
        store,
        start.tokenizer,
        window=window,
        stride=cfg.evaluation.stride or window,
        batch_size=cfg.evaluation.batch_size,
        mesh=mesh,
        rules=cfg.parallel.rules,
        max_tokens=max_tokens,
        score_prompts=cfg.data.prompt_loss,
    )


def _initial_state(
    start: Start, optimizer: optax.GradientTransformationExtraArgs, mesh: Mesh
) -> tuple[TrainState, float]:
    """The state to begin with, and the seconds of training behind it."""
    if start.resume_from is None:
        if start.initial is not None:
            return state_of(start.initial.take(), start.config, optimizer, mesh), 0.0
        return create_state(start.config, optimizer, mesh), 0.0
    target = abstract_state(start.config, optimizer, mesh)
    items = target.items(jax.ShapeDtypeStruct((), np.float64))
    there = checkpoint.entries(start.resume_from, "rest")
    rest = {name: like for name, like in items["rest"].items() if name in there}
    missing = {name: like for name, like in items["rest"].items() if name not in there}  # counts: it is an older one
    found = checkpoint.restore(start.resume_from, {**items, "rest": rest})
    found["rest"] |= {name: jax.device_put(np.zeros((), x.dtype), x.sharding) for name, x in missing.items()}
    state = TrainState.of_items(found)
    assert int(state.step) == start.step, (int(state.step), start.step)
    return state, float(found["rest"]["seconds"])


def _compile(start: Start, optimizer: optax.GradientTransformationExtraArgs, mesh: Mesh, say: Say) -> Callable:
    """The training step, compiled before the first one; the state is donated to it."""
    cfg = start.config
    attention = choice(cfg.model, mesh, length=cfg.data.context, training=True, source_length=cfg.data.source_length)
    say(f"attention  {attention.name}: {attention.reason}")
    batch = put_rows(mesh, start.pipeline.batch_at(0, own_rows(mesh, start.pipeline.batch_size)))
    with compilation.said("the training step", say):
        step = lower_step(cfg, optimizer, mesh, batch).compile()
    allocator.give_back()
    return step


def _batches(start: Start, step: int, mesh: Mesh) -> Iterator[Batch]:
    """The batches on the devices, each put there a step before it is needed; a process reads its own rows alone."""
    rows = own_rows(mesh, start.pipeline.batch_size)
    batches = start.pipeline.iterate(step, rows, threads=start.config.data.loader_threads)
    put = put_replicas if start.config.parallel.strategy == "pmap" else put_rows
    ahead: deque[Batch] = deque()
    for batch in batches:
        ahead.append(put(mesh, batch))
        if len(ahead) > 1:
            yield ahead.popleft()


def _best_cost(workdir: Path, cfg: RunConfig) -> float:
    """Of the best checkpoint so far, by what the run chooses it by now."""
    best = checkpoint.best_step(workdir)
    if best is None:
        return math.inf
    return criterion(cfg.evaluation).cost(read_manifest(checkpoint.locate(workdir, best)).metrics)


def _describe(start: Start, mesh: Mesh) -> Mapping[str, Any]:
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")
    return {
        "versions": {
            "lm": metadata.version("lm"),
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
        },
        "devices": [str(device) for device in mesh.devices.flat],
        "mesh": dict(mesh.shape),
        "resumed_from": start.step if start.resume_from else None,
    }
