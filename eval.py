"""Scores a text under a language model: python eval.py MODEL [--data SOURCE] [--window N] [--stride N] [--json FILE]"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import tyro
from rich.console import Console

from lm import allocator, cli, output
from lm.config import InputError
from lm.observe import tables
from lm.observe.bar import Bar

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from lm import Loaded, Scores


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a model lies over the devices, as in training. Whatever it is, the result is the same."""

    fsdp: int = 1
    """Devices that share the parameters between them; each has its own windows to score."""
    tensor: int = 1
    """Devices that share each layer's heads, hidden units and vocabulary, and its work."""


@dataclasses.dataclass(frozen=True)
class Arguments(cli.Processes):
    """Perplexity of a model on a text: every token of every document scored once, by the protocol that is printed."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = dataclasses.field(kw_only=True)
    """A run directory, one checkpoint inside it, or a Hugging Face model directory."""
    data: str | None = None
    """Source of text, or the name of one of the run's validation texts. None: the first of these."""
    window: int | None = None
    """Longest input the model sees, in tokens. None: evaluation.window of the run, else its training context."""
    stride: int | None = None
    """New tokens that each window scores. None: evaluation.stride of the run if the window is too, else the window."""
    score_eos: bool = False
    """Append EOS to every document and score it too."""
    step: Literal["latest", "best"] | int = "latest"
    """Which checkpoint of a run."""
    compare: Annotated[tuple[str, ...], tyro.conf.arg(metavar="MODEL")] = ()
    """Other models to score on the same text, each with its own default window; the table has all, and the paired
    differences over documents."""
    batch_size: int | None = None
    """Windows in a batch; changes no result. None: as in the run's config."""
    compute_dtype: Literal["float32", "bfloat16", "tensorfloat32"] = "float32"
    """Operands of matrix products."""
    json: str | None = None
    """Write the result to this file."""
    by_document: str | None = None
    """Write MODEL's totals of every document to this file, a line of JSON each."""
    tokens: str | None = None
    """Write MODEL's surprisal of every token to this file, a line of JSON a document."""
    harness: str | None = None
    """Tasks of lm-evaluation-harness, TASK[,TASK] (extra: harness). A text is scored then only if --data says so."""
    harness_include: str | None = None
    """A folder with task files of your own."""
    task: Literal["translation", "summarization"] | None = None
    """On pairs, also write each second side from the first and score that: BLEU and chrF, or ROUGE (extra: tasks)."""
    num_beams: int = 1
    """With --task: beams of the search; 1 is greedy."""
    length_penalty: float | None = None
    """With --num-beams: the power of its length that a beam's log-probability is divided by. None: 1."""
    max_tokens: int | None = None
    """With --task: new tokens at most for each pair. None: evaluation.task_max_tokens of the run."""
    predictions: str | None = None
    """With --task: write sources, references and what was written for them to this file, a line of JSON a pair."""
    parallel: Layout = dataclasses.field(default_factory=Layout)


def evaluate(argv: Sequence[str]) -> None:
    arguments = cli.parse(Arguments, argv, prog="eval.py")
    if "--compare" in argv and not arguments.compare:
        raise InputError("--compare names no model: give it one or more, or leave it out")
    _check_task(arguments)
    _check_harness(arguments)
    allocator.keep_freed_memory()
    with cli.loading():
        from lm import api
        from lm.evaluation.tasks import check_task
        from lm.processes import hosts

    allocator.compute_inline()
    arguments.connect()
    if arguments.task is not None:
        check_task(arguments.task)
    files = _files(arguments) if hosts.is_first() else {}
    for flag in ("harness", "task"):
        if getattr(arguments, flag) is not None and hosts.count() > 1:
            raise InputError(
                f"--{flag} runs in one process, and there are {hosts.count()}: start it on one machine, over whose "
                "devices --parallel.fsdp and --parallel.tensor lay the model out"
            )
    mesh = _mesh(arguments.parallel)
    load = functools.partial(
        api.load, step=arguments.step, dtype=arguments.compute_dtype, mesh=mesh if mesh.size > 1 else None
    )
    run = load(arguments.model)
    if arguments.harness is not None and run.config.model.has_encoder:
        raise InputError(
            f"--harness scores how texts go on, and {run.path} is an encoder_decoder, which writes targets for "
            "sources: use --task on pairs, or a decoder"
        )
    result: dict[str, Any] = {}
    if arguments.harness is None or arguments.data is not None:
        result = _score(run, [load(path) for path in arguments.compare], arguments, files)
        _write(result, files)  # before a harness may fail
    if arguments.harness is not None:
        result.setdefault("model", {"path": str(run.path), "step": run.step, "parameters": run.num_parameters})
        result["harness"] = _run_harness(run, mesh, arguments)
    _write(result, files)


def _mesh(layout: Layout) -> "Mesh":
    """All devices of all processes."""
    from lm.config import ParallelConfig
    from lm.parallel import make_mesh

    for name, size in dataclasses.asdict(layout).items():
        if size < 1:
            raise InputError(f"parallel.{name} is {size}: use 1 device or more")
    return make_mesh(ParallelConfig(fsdp=layout.fsdp, tensor=layout.tensor))


def _write(result: dict[str, Any], files: dict[str, Path]) -> None:
    if "json" in files:
        with output.whole_file(files["json"]) as file:
            file.write(json.dumps(result, indent=2, allow_nan=False) + "\n")


def _files(arguments: Arguments) -> dict[str, Path]:
    """The files to write, checked: none is a text or a model that is read."""
    from lm.data.sources.named import named_files
    from lm.run_directory import read_of_a_model, validation_sources

    models = [part for model in (arguments.model, *arguments.compare) for part in read_of_a_model(model)]
    read = [*models, *named_files([arguments.data or "", *validation_sources(arguments.model)])]
    given = {name: getattr(arguments, name) for name in ("json", "by_document", "tokens", "predictions")}
    flags = {name: f"--{name.replace('_', '-')}" for name in given}
    files = {
        name: output.writable_file(flags[name], path, read=read) for name, path in given.items() if path is not None
    }
    if len({path.resolve() for path in files.values()}) < len(files):
        raise InputError(f"{' and '.join(flags[name] for name in files)} name one file: give each its own")
    return files


def _score(run: "Loaded", others: "Sequence[Loaded]", arguments: Arguments, files: dict[str, Path]) -> dict[str, Any]:
    """Scores the text under the model, and under the others it is compared with; shows and returns the result.

    Of several processes the first alone shows and writes it.
    """
    from lm import api, scored_text
    from lm.evaluation.comparison import compare
    from lm.processes import hosts

    how = {name: getattr(arguments, name) for name in ("window", "stride", "score_eos")}
    scored_text.check_together([run, *others], None, **how)
    with _bar(hosts.is_first()) as bar, contextlib.ExitStack() as opened:
        text = scored_text.open_text(run, arguments.data, bar)
        scored_text.check_together([run, *others], text, **how)
        evaluator = (
            None if arguments.task is None else api.task_evaluator(run, arguments.task, text, **_task(arguments))
        )
        tokens: TextIO | None = None
        if "tokens" in files:
            tokens = opened.enter_context(output.whole_file(files["tokens"]))
        how |= {"batch_size": arguments.batch_size, "progress": bar}
        scores = [api.evaluate(run, text, tokens=tokens, **how)]
        scores += [api.evaluate(other, text, **how) for other in others]
        task = None if evaluator is None else evaluator(run, functools.partial(bar, f"writing by {run.path}"))
    result = scores[0].to_dict()
    if others:
        result["comparison"] = compare(scores)
    if task is not None:
        result["task"] = task.to_dict()
    if not hosts.is_first():
        return result
    for each in scores:
        _warn(each)
    if "by_document" in files:
        assert scores[0].per_document is not None
        with output.whole_file(files["by_document"]) as file:
            file.writelines(
                json.dumps(record, ensure_ascii=False) + "\n" for record in scores[0].per_document.records()
            )
    if task is not None and "predictions" in files:
        with output.whole_file(files["predictions"]) as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in task.records())
    tables.show(result)
    if others:
        tables.show_comparison(result["comparison"])
    return result


def _bar(shown: bool) -> Bar:
    return Bar(Console(stderr=True, force_terminal=None if shown else False))


def _warn(scores: "Scores") -> None:
    if not math.isfinite(scores.nats):
        assert scores.per_document is not None
        bad = sum(not math.isfinite(nats) for nats in scores.per_document.nats_D)
        print(
            f"warning: {scores.model['path']} gives no finite probability in {bad:,} of {scores.documents:,} documents "
            "(NaN or infinite weights, or an overflow): its nats, perplexities and bits are null",
            file=sys.stderr,
        )


def _check_harness(arguments: Arguments) -> None:
    if arguments.harness is None:
        if arguments.harness_include is not None:
            raise InputError("--harness-include is of no use without --harness: name tasks, or leave it out")
        return
    of_a_text = ("compare", "by_document", "tokens", "score_eos")
    if arguments.data is None and (given := [name for name in of_a_text if getattr(arguments, name)]):
        flag = f"--{given[0].replace('_', '-')}"
        raise InputError(f"{flag} is about a text, and with --harness none is scored without --data: name one")
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("--harness needs lm-evaluation-harness: pip install lm-eval")
    if arguments.harness_include is not None and not Path(arguments.harness_include).is_dir():
        raise InputError(f"--harness-include {arguments.harness_include}: there is no such folder")


def _check_task(arguments: Arguments) -> None:
    if arguments.task is None:
        for name in ("num_beams", "length_penalty", "max_tokens", "predictions"):
            if getattr(arguments, name) != getattr(Arguments, name):
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{flag} is about what a model writes: add --task translation or summarization")
        return
    for name in ("compare", "harness"):
        if getattr(arguments, name):
            raise InputError(
                f"--task is of one model on pairs of texts, and goes with no --{name}: give one of the two"
            )


def _task(arguments: Arguments) -> dict[str, Any]:
    """How texts are written, as given."""
    return {name: getattr(arguments, name) for name in ("num_beams", "length_penalty", "max_tokens", "batch_size")}


def _run_harness(run: "Loaded", mesh: "Mesh", arguments: Arguments) -> dict[str, Any]:
    """Runs the tasks, prints the harness's table, and returns its results."""
    from lm import scored_text

    scored_text.tokenizer_of(run)
    window, _ = scored_text.window_and_stride(run, arguments.window, arguments.stride)
    batch_size = run.config.evaluation.batch_size if arguments.batch_size is None else arguments.batch_size
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: use 1 window or more")
    tasks = [name.strip() for name in (arguments.harness or "").split(",") if name.strip()]
    if not tasks:
        raise InputError("--harness names no task: give one or more, as in --harness lambada_openai,piqa")
    from lm.evaluation import harness

    with _bar(True) as bar:
        model = harness.HarnessModel(run, window=window, batch_size=batch_size, mesh=mesh, progress=bar)
        results = harness.evaluate(model, tasks, arguments.harness_include)
    print(harness.table(results))
    return results


if __name__ == "__main__":
    cli.main(evaluate)
