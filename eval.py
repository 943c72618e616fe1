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
from rich.table import Table
from rich.text import Text

from lm import allocator, cli, output
from lm.config import InputError
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
    parallel: Layout = dataclasses.field(default_factory=Layout)


def evaluate(argv: Sequence[str]) -> None:
    arguments = cli.parse(Arguments, argv, prog="eval.py")
    _check_harness(arguments)
    allocator.keep_freed_memory()
    with cli.loading():
        from lm import api
        from lm.processes import hosts

    arguments.connect()
    files = _files(arguments) if hosts.is_first() else {}
    if arguments.harness is not None and hosts.count() > 1:
        raise InputError(
            f"--harness runs in one process, and there are {hosts.count()}: start it on one machine, over whose "
            "devices --parallel.fsdp and --parallel.tensor lay the model out"
        )
    mesh = _mesh(arguments.parallel)
    load = functools.partial(
        api.load, step=arguments.step, dtype=arguments.compute_dtype, mesh=mesh if mesh.size > 1 else None
    )
    run = load(arguments.model)
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
    """The files to write, checked."""
    given = {name: getattr(arguments, name) for name in ("json", "by_document", "tokens")}
    flags = {name: f"--{name.replace('_', '-')}" for name in given}
    files = {name: output.writable_file(flags[name], path) for name, path in given.items() if path is not None}
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
        tokens: TextIO | None = None
        if "tokens" in files:
            tokens = opened.enter_context(output.whole_file(files["tokens"]))
        how |= {"batch_size": arguments.batch_size, "progress": bar}
        scores = [api.evaluate(run, text, tokens=tokens, **how)]
        scores += [api.evaluate(other, text, **how) for other in others]
    result = scores[0].to_dict()
    if others:
        result["comparison"] = compare(scores)
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
    _show(result)
    if others:
        _show_comparison(result["comparison"])
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


def _show(result: dict[str, Any]) -> None:
    """A table on a terminal, a line `name: value` each elsewhere."""
    names = ("nats_per_token", "standard_error", "perplexity", "word_perplexity", "bits_per_byte")
    rows = {name.replace("_", " "): _number(result[name]) for name in names}
    rows |= {name: f"{result[name]:,}" for name in ("tokens", "words", "bytes", "documents")}
    rows |= {f"protocol {name}": str(value) for name, value in result["protocol"].items()}
    rows |= {"model": f"{result['model']['path']} ({result['model']['parameters']:,} parameters)"}
    rows |= {"seconds": f"{result['seconds']:.2f}"}
    console = Console()
    if not console.is_terminal:
        print("\n".join(f"{name}: {value}" for name, value in rows.items()))
        return
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, Text(value))  # as it stands: [validation] is no markup
    console.print(table)


def _show_comparison(comparison: dict[str, Any]) -> None:
    """The models, a row each, and the differences of all pairs; tabs between the columns where it is no terminal."""
    names = ("nats_per_token", "perplexity", "word_perplexity", "bits_per_byte")
    models = comparison["models"]
    rows = [["", "model", *(name.replace("_", " ") for name in names), "window", "stride"]]
    for number, each in enumerate(models, 1):
        protocol = [str(each["protocol"][name]) for name in ("window", "stride")]
        rows.append([str(number), each["path"], *(_number(each[name]) for name in names), *protocol])
    _show_rows(rows)
    _show_rows(
        [["difference", "over the same documents", "standard error", "unit"]]
        + [
            [
                f"{pair['models'][1] + 1} - {pair['models'][0] + 1}",
                _number(pair["difference"], "+.6g"),
                _number(pair["standard_error"]),
                pair["unit"],
            ]
            for pair in comparison["pairs"]
        ]
    )


def _show_rows(rows: list[list[str]]) -> None:
    console = Console()
    if not console.is_terminal:
        print("\n" + "\n".join("\t".join(row) for row in rows))
        return
    table = Table()
    for name in rows[0]:
        table.add_column(name, overflow="fold")  # on a narrow terminal nothing is left out
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    console.print(table)


def _number(value: float | None, form: str = ".6g") -> str:
    return "-" if value is None else format(value, form)


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
