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
from lm.evaluation import compression
from lm.evaluation.perplexity import EachDocument, Evaluator, Scores
from lm.generation import Sampling
from lm.manifest import add_metrics, fingerprint, read_manifest, write_atomically
from lm.nn.language_model import model_specs
from lm.parallel import make_mesh, parameter_shardings, rules_of
from lm.processes import hosts
from lm.training.loop import summary
from lm.training.run import evaluator
from lm.training.start import Start
from lm.training.texts import Validation

EVALUATION = "eval.json"
TEMPERATURE = 0.8
"""Of the sample."""


def score(
    run: Loaded,
    evaluator: Evaluator,
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
    first = next(iter(evaluators))
    params_sha256 = fingerprint(read_manifest(run.path), "params")
    protocols = [each.protocol for each in evaluators.values()]
    kept = _kept(path, params_sha256, protocols, list(evaluators)[1:]) if hosts.is_first() else None
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
    write_atomically(path, json.dumps(result, indent=2, allow_nan=False) + "\n")
    if start.config.evaluation.every_steps is None:  # the only evaluation there is: then it says which step is best
        add_metrics(run.path, summary(scores))
    return result


def _kept(path: Path, params_sha256: str, protocols: list[Any], others: list[str]) -> dict[str, Any] | None:
    """The evaluation that is there already, if it is of these parameters and by these protocols."""
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError, KeyError):
        found = json.loads(path.read_text(encoding="utf-8"))
        theirs = [found["protocol"], *(found["others"][name]["protocol"] for name in others)]
        if found["model"]["params_sha256"] == params_sha256 and theirs == protocols:
            return found
    return None


def _yardsticks(validation: Validation) -> dict[str, float]:
    """What compressors need for a text that is scored whole, in bits a byte."""
    if validation.store.prompts is not None or not isinstance(validation.text, Corpus):
        return {}
    return compression.bits_per_byte(document.text for document in validation.text)


def conclude(
    run: Loaded, tokenizer: Tokenizer, result: dict[str, Any], workdir: Path, say: Callable[[str], None]
) -> None:
    """The last lines of a run: its numbers, a sample, where it lies and what to try next."""
    if result["nats"] is None:
        say("diverged   the loss is not a finite number: lower optimizer.learning_rate, or set optimizer.clip_norm")
    else:
        others = "".join(f", {name} {bits:.3f}" for name, bits in result["compressors_bits_per_byte"].items())
        say(f"validation perplexity {result['perplexity'] or math.inf:.3f} over {result['tokens']:,} tokens")
        say(f"           {result['bits_per_byte']:.3f} bits per byte" + (f" (the same text{others})" if others else ""))
        for name, other in result.get("others", {}).items():
            say(f"           {name}: perplexity {other['perplexity'] or math.inf:.3f} over {other['tokens']:,} tokens")
        prompt = run.config.observe.sample_prompt
        if prompt is not None and hosts.count() > 1:  # the parameters are spread over them
            say(f"sample     none is drawn by {hosts.count()} processes: see python -m lm generate")
        elif prompt is not None:
            left = generation.room(run.config.model, len(generation.prompt_ids(tokenizer, prompt)))
            tokens = run.config.observe.sample_tokens if left is None else min(run.config.observe.sample_tokens, left)
            say(f"sample     {prompt!r} goes on, at temperature {TEMPERATURE}:")
            sampled = generation.generate(
                run.params,
                run.config.model,
                tokenizer,
                [prompt],
                max_tokens=tokens,
                sampling=Sampling(TEMPERATURE, None, None),
                seed=0,
            )
            say(prompt + sampled[0])
    say(f"saved      {run.path}")
    place = shlex.quote(str(workdir))
    prompt = shlex.quote(run.config.observe.sample_prompt or "The ")
    say(f"next       python eval.py {place}   or   python -m lm generate {place} --prompt {prompt}")
