"""What follows the last step of a run: its validation texts are scored whole, and its last lines are said."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from lm import compilation, generation
from lm.checkpoint import Loaded
from lm.config import ParallelConfig
from lm.data.corpus import Corpus
from lm.data.tokenizer import Tokenizer
from lm.data.tokens import TokenStore
from lm.evaluation import compression, tasks
from lm.evaluation.measured import titled
from lm.evaluation.pairs import PairEvaluator
from lm.evaluation.perplexity import EachDocument, Evaluator, Scores
from lm.evaluation.tasks import TaskEvaluator, TaskScores
from lm.evaluation.writing import Decoding, predict
from lm.manifest import add_metrics, fingerprint, read_manifest, write_atomically
from lm.nn.language_model import model_specs
from lm.parallel import make_mesh, parameter_shardings, rules_of
from lm.processes import hosts
from lm.run_directory import best_step
from lm.sampling import Sampling
from lm.token_generation import room
from lm.training.loop import summary
from lm.training.run import evaluator
from lm.training.start import Start
from lm.training.task import keep_predictions, task_evaluator
from lm.training.texts import Validation, separator_of

EVALUATION = "eval.json"
TEMPERATURE = 0.8
"""Of the sample."""
SHOWN_CHARACTERS = 300
"""Of a text in the examples."""


def score(
    run: Loaded,
    evaluator: Evaluator | PairEvaluator,
    mesh: Mesh,
    progress: Callable[[int, int], None] | None = None,
    each_document: EachDocument | None = None,
) -> Scores:
    """The scores of a model, its parameters laid out on the mesh; the scores say which model it is."""
    rules = rules_of(ParallelConfig(rules=evaluator.rules))
    params = jax.device_put(run.params, parameter_shardings(mesh, model_specs(run.config.model), rules))
    described = {"path": str(run.path), "step": run.step, "parameters": run.num_parameters}
    return dataclasses.replace(evaluator(params, progress, each_document), model=described)


def final_evaluation(run: Loaded, start: Start, workdir: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Scores the whole validation text and keeps the result in the run; of a complete run it is there already.

    All processes score it; what the first alone adds is missing in what the others return.
    """
    path, mesh = workdir / EVALUATION, make_mesh(start.config.parallel)
    evaluators = {name: evaluator(start, name, mesh, in_loop=False) for name in start.validation}
    task = task_evaluator(start.config, start.validation, in_loop=False)
    first = next(iter(evaluators))
    params_sha256 = fingerprint(read_manifest(run.path), "params")
    protocols = [each.protocol for each in evaluators.values()]
    kept = _kept(path, params_sha256, protocols, list(evaluators)[1:], task) if hosts.is_first() else None
    if (found := json.loads(hosts.agree("the final evaluation", json.dumps(kept)))) is not None:
        say(f"complete   {workdir} has used up its budget; a run by --training.steps goes on with more of them")
        return found
    with compilation.said("the final evaluation", say):
        scores = {name: score(run, each, mesh) for name, each in evaluators.items()}
    result = scores[first].to_dict()
    if not hosts.is_first():
        return result
    result["model"]["params_sha256"] = params_sha256
    result["compressors_bits_per_byte"] = _yardsticks(start.validation[first])
    if len(scores) > 1:
        result["others"] = {name: each.to_dict() for name, each in scores.items() if name != first}
    # Where it is the only evaluation there is, it says which step is best.
    if start.config.evaluation.every_steps is None:
        add_metrics(run.path, summary(scores))
    if task is not None:
        written = _write_all(run, task, workdir, say)
        result["task"] = written.to_dict()
        if start.config.evaluation.task_every_steps is None:
            add_metrics(run.path, written.metrics())
    write_atomically(path, json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result


def _write_all(run: Loaded, task: TaskEvaluator, workdir: Path, say: Callable[[str], None]) -> TaskScores:
    """The translations or summaries of all validation pairs, which are kept in the run, with their scores."""
    with compilation.said("the task", say):
        scores = task(run)
    keep_predictions(scores, workdir)
    return scores


def _kept(
    path: Path, params_sha256: str, protocols: list[Any], others: list[str], task: TaskEvaluator | None
) -> dict[str, Any] | None:
    """The evaluation that is there already, if it is of these parameters and by these protocols."""
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError, KeyError):
        found = json.loads(path.read_text(encoding="utf-8"))
        theirs = [found["protocol"], *(found["others"][name]["protocol"] for name in others)]
        same = theirs == protocols and (task is None or found["task"]["protocol"] == task.protocol)
        if found["model"]["params_sha256"] == params_sha256 and same:
            return found
    return None


def _yardsticks(validation: Validation) -> dict[str, float]:
    """What compressors need for a text that is scored whole, in bits a byte."""
    store = validation.store
    if not isinstance(store, TokenStore) or store.prompts is not None or not isinstance(validation.text, Corpus):
        return {}
    return compression.bits_per_byte(document.text for document in validation.text)


def conclude(run: Loaded, start: Start, result: dict[str, Any], workdir: Path, say: Callable[[str], None]) -> None:
    """The last lines of a run: its numbers, a sample, where it lies and what to try next."""
    if result["nats"] is None:
        say("diverged   the loss is not a finite number: lower optimizer.learning_rate, or set optimizer.clip_norm")
    else:
        _say_perplexities(result, say)
        if "task" in result:
            _say_task(result["task"], say)
        elif run.config.observe.sample_prompt is not None:
            if hosts.count() > 1:  # the parameters are spread over them
                say(f"sample     none is drawn by {hosts.count()} processes: see python -m lm generate")
            elif run.config.model.has_encoder:
                _say_written(run, start, say)
            else:
                _say_continuation(run, start.tokenizer, say)
    say(f"saved      {run.path}")
    say(f"next       {_next(run, workdir)}")


def _say_perplexities(result: dict[str, Any], say: Callable[[str], None]) -> None:
    compressors = result["compressors_bits_per_byte"].items()
    others = "".join(f", {name} {bits:.3f}" for name, bits in compressors)
    say(f"validation perplexity {result['perplexity'] or math.inf:.3f} over {result['tokens']:,} tokens")
    say(f"           {result['bits_per_byte']:.3f} bits per byte" + (f" (the same text{others})" if others else ""))
    for name, other in result.get("others", {}).items():
        say(f"           {name}: perplexity {other['perplexity'] or math.inf:.3f} over {other['tokens']:,} tokens")


def _say_task(task: dict[str, Any], say: Callable[[str], None]) -> None:
    """The metrics of a task, and a few of the texts that were written."""
    scores = titled(task["metrics"])
    say(f"{task['name']} {scores} over {task['documents']:,} pairs, in {task['seconds']:.0f} s")
    if "lead_sentence" in task:
        say(f"           first sentences alone: {titled(task['lead_sentence'])}")
    for example in task["examples"]:
        say(f"source     {shortened(example['source'])}")
        say(f"reference  {shortened(example['references'][0])}")
        say(f"output     {shortened(example['prediction'])}")


def _say_written(run: Loaded, start: Start, say: Callable[[str], None]) -> None:
    """What an encoder_decoder makes of the sample prompt; without one, of the source of a validation pair."""
    source = run.config.observe.sample_prompt or ""
    references: tuple[str, ...] = ()
    if not source:
        text = next(iter(start.validation.values())).text
        assert isinstance(text, Corpus), "the family is trained on pairs of texts"
        [(_, source, references)] = tasks.pairs_of(text, separator_of(run.config), 1)
    tokens, left = run.config.observe.sample_tokens, room(run.config.model, 1)  # a target follows one id
    written = predict(run, [source], Decoding(tokens if left is None else min(tokens, left), batch_size=1))
    say(f"source     {shortened(source)}")
    for reference in references[:1]:
        say(f"reference  {shortened(reference)}")
    say(f"output     {shortened(written[0].text)}")


def _say_continuation(run: Loaded, tokenizer: Tokenizer, say: Callable[[str], None]) -> None:
    prompt, tokens = run.config.observe.sample_prompt or "", run.config.observe.sample_tokens
    left = room(run.config.model, len(generation.prompt_ids(tokenizer, prompt)))
    say(f"sample     {prompt!r} goes on, at temperature {TEMPERATURE}:")
    sampled = generation.generate(
        run.params,
        run.config.model,
        tokenizer,
        [prompt],
        max_tokens=tokens if left is None else min(tokens, left),
        sampling=Sampling(TEMPERATURE, None, None),
        seed=0,
    )
    say(prompt + sampled[0])


def _next(run: Loaded, workdir: Path) -> str:
    """Two commands to try."""
    place = shlex.quote(str(workdir))
    task, prompt = run.config.evaluation.task, run.config.observe.sample_prompt or "The "
    if run.config.model.has_encoder and not run.config.observe.sample_prompt:
        prompt = "A text in the language of the sources."
    scored = f"python eval.py {place}"
    if task is not None:
        best = best_step(workdir) not in (None, run.step)
        scored += (" --step best" if best else "") + f" --task {task} --num-beams 4"
    return f"{scored}   or   python -m lm generate {place} --prompt {shlex.quote(prompt)}"


def shortened(text: str) -> str:
    """On one line, of a long text the beginning."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else line[:SHOWN_CHARACTERS] + " ..."
