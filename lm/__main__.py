"""python -m lm COMMAND: thin, one function a subcommand."""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from lm import allocator, cli, output
from lm.config import DataConfig, InputError, RunConfig, TokenizerConfig
from lm.fields import nearest
from lm.observe.bar import Bar


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continues a prompt, or with an encoder_decoder writes the target of a source: given on the command line, one in
    each line of a file, or typed one after another."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run directory, one checkpoint inside it, or a Hugging Face model folder."""
    prompt: str | None = None
    """Text to continue. None: the empty one, without --input and --interactive."""
    input: str | None = None
    """A file with a prompt in each line; - is standard input. What is written for each is a line of its own, a line
    break in it written as \\n."""
    interactive: bool = False
    """Ask for prompts, and show each text as it is written."""
    output: str | None = None
    """Write the texts to this file, a line each, instead of showing them. None: off."""
    max_tokens: int | None = None
    """New tokens at most. None: 128, or what learned positions leave room for."""
    temperature: float | None = None
    """0 is greedy. None: 0.8."""
    top_k: int | None = None
    """Draw from the k most probable tokens alone. None: off."""
    top_p: float | None = None
    """Draw from the fewest tokens whose probabilities reach p. None: off."""
    min_p: float | None = None
    """Draw from tokens with at least this times the probability of the likeliest. None: off."""
    repetition_penalty: float | None = None
    """Above 1: tokens that are there already, in the prompt too, become less likely. None: off."""
    stop: tuple[str, ...] = ()
    """Texts to stop at."""
    stop_ids: tuple[int, ...] = ()
    """Token ids to stop at, besides EOS."""
    samples: int = 1
    """Texts for each prompt, drawn one as the other."""
    num_beams: int = 1
    """2 or more: search for the likeliest text with so many beams, instead of drawing."""
    length_penalty: float | None = None
    """Beams are compared by log-probability over tokens to the power of this. None: 1."""
    early_stopping: Literal["True", "False", "never"] = "False"
    """When a search ends: see lm/beams.py."""
    num_return: int = 1
    """With --num-beams: how many of the best texts are given for each prompt, with their scores."""
    seed: int = 0
    """Seed of the draws."""
    batch_size: int = 16
    """Prompts at a time. Changes no text."""
    dtype: Literal["float32", "bfloat16", "tensorfloat32"] = "float32"
    """What it computes in."""
    step: Literal["latest", "best"] | int = "latest"
    """Which checkpoint of the run."""


def generate(argv: Sequence[str]) -> None:
    """Prints the prompt with each continuation; of lines of a file, and what an encoder_decoder writes, these alone."""
    arguments = cli.parse(Generate, _with_value(argv, "--interactive"), prog="python -m lm generate")
    _check_generate(arguments)
    prompts = [arguments.prompt or ""] if arguments.input is None else _lines(arguments.input)
    target = None if arguments.output is None else output.writable_file("--output", arguments.output)
    allocator.keep_freed_memory()
    with cli.loading():
        from lm import api

    run = api.load(arguments.model, step=arguments.step, dtype=arguments.dtype)
    if arguments.interactive:
        _converse(arguments, run)
        return
    common: dict[str, Any] = {"max_tokens": arguments.max_tokens, "stop_ids": arguments.stop_ids}
    common["batch_size"] = arguments.batch_size
    if arguments.num_beams == 1:
        repeated = [prompt for prompt in prompts for _ in range(arguments.samples)]
        texts = api.generate(run, repeated, **common, **_draws(arguments))
    else:
        several = api.n_best(run, prompts, num_return=arguments.num_return, **_search(arguments), **common)
        repeated = [prompt for prompt in prompts for _ in range(arguments.num_return)]
        texts = [each.text for row in several for each in row]
        if arguments.num_return > 1:
            for row in several:
                print("scores    " + "  ".join(f"{each.score:.4f}" for each in row), file=sys.stderr)
    if target is not None:
        with output.whole_file(target) as file:
            file.writelines(_on_a_line(text) + "\n" for text in texts)
        print(f"saved      {target}: {len(texts):,} texts")
    elif arguments.input is not None:
        for text in texts:
            print(_on_a_line(text))
    else:
        whole = texts if run.config.model.has_encoder else [p + text for p, text in zip(repeated, texts, strict=True)]
        print(("\n" + "-" * 60 + "\n").join(whole))


def _with_value(argv: Sequence[str], flag: str) -> list[str]:
    """A boolean flag that stands alone means True."""
    found: list[str] = []
    for word, after in zip(argv, [*argv[1:], "--"], strict=True):
        found += [word, "True"] if word == flag and after.startswith("-") else [word]
    return found


def _check_generate(arguments: Generate) -> None:
    """Raises InputError on arguments that contradict each other, before anything is loaded."""
    if arguments.samples < 1:
        raise InputError(f"--samples is {arguments.samples}: use 1 or more")
    given = [
        f"--{name}" for name in ("prompt", "input", "interactive") if getattr(arguments, name) not in (None, False)
    ]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} both say what the prompts are: use one of them")
    if arguments.interactive and (arguments.output is not None or arguments.samples > 1 or arguments.num_beams > 1):
        raise InputError("--interactive shows a text as it is drawn: leave out --output, --samples and --num-beams")
    drawing = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop")
    drawn = [name for name in drawing if getattr(arguments, name) not in (None, ())]
    drawn = [name for name in drawn if (name, getattr(arguments, name)) != ("temperature", 0.0)]
    if arguments.samples > 1:
        drawn.append("samples")
    if arguments.num_beams != 1 and drawn:
        flag = "--" + drawn[0].replace("_", "-")
        raise InputError(
            f"--num-beams {arguments.num_beams} takes the likeliest text, which {flag} has no effect on: leave out one "
            "of the two (several texts of a search: --num-return)"
        )
    if arguments.num_beams == 1:
        for name, usual in (("length_penalty", None), ("early_stopping", "False"), ("num_return", 1)):
            if getattr(arguments, name) != usual:
                flag = "--" + name.replace("_", "-")
                way_out = " (several drawn texts: --samples)" if name == "num_return" else ""
                raise InputError(f"{flag} is of a beam search: use --num-beams 2 or more with it{way_out}")


def _draws(arguments: Generate) -> dict[str, Any]:
    names = ("top_k", "top_p", "min_p", "repetition_penalty", "stop", "seed")
    temperature = 0.8 if arguments.temperature is None else arguments.temperature
    return {"temperature": temperature, **{name: getattr(arguments, name) for name in names}}


def _search(arguments: Generate) -> dict[str, Any]:
    early = {"True": True, "False": False, "never": "never"}[arguments.early_stopping]
    return {
        "num_beams": arguments.num_beams,
        "length_penalty": arguments.length_penalty,
        "early_stopping": early,
    }


def _lines(name: str) -> list[str]:
    """The prompts of a file."""
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise InputError(f"--input {name} can't be read: {reason}") from error
    if not (lines := text.split("\n")[:-1] if text.endswith("\n") else text.split("\n")) or not text:
        raise InputError(f"--input {name} is empty: give it a prompt in each line")
    return lines


def _on_a_line(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")


def _converse(arguments: Generate, run: Any) -> None:
    """Prompts from standard input, one line each, until its end. At a terminal an error about one ends nothing."""
    from lm import api

    asking = sys.stdin.isatty()
    while True:
        if asking:
            print("> ", end="", flush=True)
        if not (line := sys.stdin.readline()):
            return
        prompt = line.rstrip("\n")
        try:
            pieces = api.stream(
                run, prompt, max_tokens=arguments.max_tokens, stop_ids=arguments.stop_ids, **_draws(arguments)
            )
        except InputError as error:
            if not asking:
                raise
            print(f"error: {error}", file=sys.stderr)
            continue
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)


@dataclasses.dataclass(frozen=True)
class InspectData:
    """Shows what a source of text holds: documents, tokens, bytes per token, and some rows with their boundaries."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Source of text, as in data.train."""
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    rows: int = 3
    """Rows of the first batch to show."""
    seed: int = 0
    """Seed of the order of the rows."""


def inspect_data(argv: Sequence[str]) -> None:
    """Prints the totals and the rows."""
    arguments = cli.parse(InspectData, argv, prog="python -m lm data inspect")
    from lm.data import inspection
    from lm.validation import validate

    data = dataclasses.replace(arguments.data, train=arguments.source)
    validate(RunConfig(data=data, tokenizer=arguments.tokenizer))
    with Bar(Console(stderr=True)) as bar:
        lines = inspection.inspect(
            data, arguments.tokenizer, rows_shown=arguments.rows, seed=arguments.seed, progress=bar
        )
        for line in lines:
            print(line)


@dataclasses.dataclass(frozen=True)
class TrainTokenizer:
    """Trains a BPE tokenizer on sources of text and writes it as a tokenizer.json."""

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Sources of text, as in data.train."""
    output: str = "tokenizer.json"
    """Where to write it."""
    vocab_size: int = 4096
    """Tokens, special tokens included."""
    byte_fallback: bool = False
    """Train on characters, with byte tokens for those left out, instead of on bytes."""
    special_tokens: tuple[str, ...] = ()
    """Special tokens besides BOS and EOS."""
    document_separator: str | None = None
    """Splits each text file into documents. None: one document a file."""
    pair_separator: str = "\n"
    """Between the two sides of a pair."""


def train_tokenizer(argv: Sequence[str]) -> None:
    """Trains, writes, and says what came out."""
    arguments = cli.parse(TrainTokenizer, argv, prog="python -m lm tokenizer train")
    if not arguments.sources:
        raise InputError("no source of text to train on: name one or more, as in data.train")
    target = output.writable_file("--output", arguments.output)
    from lm.data import tokenizer
    from lm.data.corpus import open_corpus

    separators = {name: getattr(arguments, name) for name in ("document_separator", "pair_separator")}
    corpora = [open_corpus(source, **separators) for source in arguments.sources]
    with Bar(Console(stderr=True)) as bar:
        trained = tokenizer.train_tokenizer(
            corpora,
            arguments.vocab_size,
            byte_fallback=arguments.byte_fallback,
            special_tokens=arguments.special_tokens,
            progress=functools.partial(bar, "training the tokenizer"),
        )
    saved = trained.save(target)
    print(f"saved      {saved}: {trained.vocab_size:,} tokens, BOS {trained.bos}, EOS {trained.eos}")
    place = shlex.quote(str(saved))
    print(f"next       python train.py --tokenizer.kind file --tokenizer.path {place} --data.train SOURCE")


@dataclasses.dataclass(frozen=True)
class Import:
    """Turns a Hugging Face model folder into a run directory."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """A folder with config.json, *.safetensors and, if there is one, a tokenizer."""
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run directory to write: new or empty."""


def import_model(argv: Sequence[str]) -> None:
    """Writes the run and says what is in it."""
    arguments = cli.parse(Import, argv, prog="python -m lm import")
    target = output.new_folder("RUN", arguments.run)
    from lm import checkpoint
    from lm.interop import huggingface

    run = huggingface.load(arguments.folder)
    with output.whole_folder(target) as scratch:
        saved = checkpoint.write(run, scratch, provenance={"imported_from": str(run.path.absolute())})
    print(f"saved      {target / saved.relative_to(scratch)}: {run.num_parameters:,} parameters")
    data = "pairs:FILE.tsv" if run.config.model.has_encoder else "SOURCE"
    print(f"next       python eval.py {shlex.quote(arguments.run)} --data {data}")


@dataclasses.dataclass(frozen=True)
class Export:
    """Writes a model as a Hugging Face folder, which transformers opens."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run directory, one checkpoint inside it, or a Hugging Face model folder."""
    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """The folder to write: new or empty."""
    family: str | None = None
    """The architecture, a model_type of transformers. None: the first that the model is one of."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights."""
    max_shard_bytes: int = 5_000_000_000
    """Weights that are more than this are split over several files."""
    step: Literal["latest", "best"] | int = "latest"
    """Which checkpoint of the run."""


def export_model(argv: Sequence[str]) -> None:
    """Writes the folder and says which files."""
    arguments = cli.parse(Export, argv, prog="python -m lm export")
    target = output.new_folder("DIR", arguments.folder)
    from lm import api
    from lm.interop import huggingface

    run = api.load(arguments.model, step=arguments.step)
    with output.whole_folder(target) as scratch:
        files = huggingface.save(
            run, scratch, family=arguments.family, dtype=arguments.dtype, max_shard_bytes=arguments.max_shard_bytes
        )
    print(f"saved      {arguments.folder}: {', '.join(path.name for path in files)}")


@dataclasses.dataclass(frozen=True)
class PlanArguments(cli.PresetArguments):
    """Says what a run would take, before anything runs: parameters, FLOPs a token, bytes a device. PRESET and fields as
    for train.py. No text is read: a BPE that is to be trained is taken to have tokenizer.vocab_size tokens. With
    --device, the step is compiled ahead of time for as many fake devices: what XLA finds it to take, what the devices
    exchange, and what that takes at least by the device's data sheet."""

    devices: int | None = None
    """Devices to share the run out over; they needn't be there. None: as many as the parallel section names."""
    mesh: str | None = None
    """Sizes of the mesh axes in place of the parallel section's and --devices, as in data=8,fsdp=64."""
    device: str | None = None
    """The accelerator to plan for: h100, h200, b200, a100, tpu-v4, tpu-v5e, tpu-v5p or tpu-v6e. None: nothing is
    compiled."""
    devices_per_host: int | None = None
    """Devices that fast links join, NVLink or ICI. None: those of the device: 8 GPUs of a host, a pod of TPUs."""
    json: str | None = None
    """Also write the figures to this file."""


def plan(argv: Sequence[str]) -> None:
    """Prints the table."""
    from lm import api

    name, arguments = cli.with_preset(PlanArguments, argv, api.preset, prog="python -m lm plan")
    target = None if arguments.json is None else output.writable_file("--json", arguments.json)
    from lm import forecast
    from lm import plan as plans
    from lm.costs import accelerators

    device = None if arguments.device is None else accelerators.accelerator(arguments.device)
    island = arguments.devices_per_host
    if island is not None and (device is None or island < 1):
        raise InputError(f"--devices-per-host is {island}: use 1 or more, with --device")
    config = arguments.config
    if arguments.mesh is not None:
        if arguments.devices is not None:
            raise InputError(f"--mesh {arguments.mesh} says how many devices there are: leave --devices out")
        sizes = forecast.parsed_mesh(arguments.mesh)
        parallel = dataclasses.replace(config.parallel, data=sizes.data, fsdp=sizes.fsdp, tensor=sizes.tensor)
        config = dataclasses.replace(config, parallel=parallel)
    parallel = config.parallel
    named = (parallel.data or 1) * parallel.fsdp * parallel.tensor
    devices = named if arguments.devices is None else arguments.devices
    if device is not None and devices > 0:
        forecast.fake_devices(devices)  # before a model that it goes on from is opened on a real one
    config = plans.resolved(config, api.load)
    if device is None:
        found = plans.plan(config, devices)
        lines, figures = plans.lines(name, found), found.as_dict()
    else:
        future = forecast.forecast(config, devices, str(arguments.device), device, island)
        lines = plans.lines(name, future.planned) + forecast.lines(future, device, island)
        figures = {**future.planned.as_dict(), "forecast": future.as_dict()}
    if target is not None:
        with output.whole_file(target) as file:
            file.write(json.dumps({"preset": name, **figures}, indent=2) + "\n")
    for line in lines:
        print(line)


@dataclasses.dataclass(frozen=True)
class Launch:
    """Runs train.py or eval.py as several processes on this machine, as a cluster would: for tests and for teaching.
    What follows -- is the command: python -m lm launch --processes 4 -- train.py PRESET ..."""

    processes: int
    """How many."""
    devices: int = 1
    """CPU devices of each."""
    timeout: float | None = None
    """Seconds after which all are killed. None: never."""


def launch(argv: Sequence[str]) -> None:
    """Runs them; its exit status is the first of theirs that isn't 0."""
    own, dashes, command = (list(argv), [], []) if "--" not in argv else _split(argv)
    arguments = cli.parse(Launch, own, prog="python -m lm launch")
    if not dashes:
        raise InputError("the command to launch follows --: python -m lm launch --processes 4 -- train.py PRESET ...")
    from lm.launch import launch as run

    if status := run(command, processes=arguments.processes, devices=arguments.devices, seconds=arguments.timeout):
        sys.exit(status)


def _split(argv: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """What comes before the first --, that itself, and what follows."""
    place = list(argv).index("--")
    return list(argv[:place]), ["--"], list(argv[place + 1 :])


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "generate": generate,
    "plan": plan,
    "launch": launch,
    "import": import_model,
    "export": export_model,
    "data inspect": inspect_data,
    "tokenizer train": train_tokenizer,
}


def main(argv: Sequence[str]) -> None:
    """Finds the subcommand, of one word or two, and runs it."""
    usage = f"usage: python -m lm COMMAND ... (each has --help), COMMAND one of: {', '.join(COMMANDS)}"
    if not argv or argv[0] in ("-h", "--help"):
        print(usage, file=sys.stdout if argv else sys.stderr)
        sys.exit(0 if argv else 2)
    for words in (1, 2):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            return COMMANDS[name](argv[words:])
    known = [name for name in COMMANDS if name.split()[0] == argv[0]]  # of two words, the second is wrong
    given = " ".join(argv[:2]) if known else argv[0]
    raise InputError(f"no command {given!r}{nearest(given, known or COMMANDS)}\n{usage}")


if __name__ == "__main__":
    cli.main(main)
