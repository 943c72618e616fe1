"""python -m lm generate: text after prompts, or for sources."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lm import allocator, cli, output
from lm.config import InputError
from lm.run_directory import read_of_a_model


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continues a prompt, or with an encoder_decoder writes the target of a source: given on the command line, one in
    each line of a file, or typed one after another."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run directory, one checkpoint inside it, or a Hugging Face model folder."""
    prompt: Annotated[
        str | None, tyro.conf.arg(constructor=str, metavar="TEXT", help_behavior_hint="(default: None)")
    ] = None
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
    seed: int | None = None
    """Seed of the draws. None: 0."""
    batch_size: int = 16
    """Prompts at a time. Changes no text but by rounding, in bfloat16."""
    dtype: Literal["float32", "bfloat16", "tensorfloat32"] = "float32"
    """What it computes in."""
    step: Literal["latest", "best"] | int = "latest"
    """Which checkpoint of the run."""


def generate(argv: Sequence[str]) -> None:
    """Prints the prompt with each continuation; of lines of a file, and what an encoder_decoder writes, these alone."""
    arguments = cli.parse(Generate, _with_values(argv), prog="python -m lm generate")
    _check_generate(arguments)
    prompts = [arguments.prompt or ""] if arguments.input is None else _lines(arguments.input)
    target = None
    if arguments.output is not None:
        read = [*read_of_a_model(arguments.model), *([] if arguments.input is None else [Path(arguments.input)])]
        target = output.writable_file("--output", arguments.output, read=read)
    allocator.keep_freed_memory()
    with cli.loading():
        from lm import api

    allocator.compute_inline()
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


def _with_values(argv: Sequence[str]) -> list[str]:
    """--interactive alone means True; what follows --prompt is the prompt, also where it looks like a flag."""
    found: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--prompt" and (text := next(words, None)) is not None:
            word = f"--prompt={text}"
        elif found and found[-1] == "--interactive" and word not in ("True", "False"):
            found.append("True")
        found.append(word)
    return [*found, "True"] if found and found[-1] == "--interactive" else found


def _check_generate(arguments: Generate) -> None:
    """Raises InputError on arguments that contradict each other, before anything is loaded."""
    for name in ("samples", "num_beams", "batch_size"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}: use 1 or more")
    if arguments.samples > 1 and arguments.temperature == 0:
        raise InputError(
            f"--samples {arguments.samples} of --temperature 0 would all be the same text: leave out one of the two"
        )
    given = [
        f"--{name}" for name in ("prompt", "input", "interactive") if getattr(arguments, name) not in (None, False)
    ]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} both say what the prompts are: use one of them")
    if arguments.interactive and (arguments.output is not None or arguments.samples > 1 or arguments.num_beams != 1):
        raise InputError("--interactive shows a text as it is drawn: leave out --output, --samples and --num-beams")
    drawing = ("temperature", "top_k", "top_p", "min_p", "seed")
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
    names = ("top_k", "top_p", "min_p", "repetition_penalty", "stop")
    temperature = 0.8 if arguments.temperature is None else arguments.temperature
    return {"temperature": temperature, "seed": arguments.seed or 0, **{n: getattr(arguments, n) for n in names}}


def _search(arguments: Generate) -> dict[str, Any]:
    names = ("num_beams", "length_penalty", "repetition_penalty", "stop")
    early = {"True": True, "False": False, "never": "never"}[arguments.early_stopping]
    return {"early_stopping": early, **{n: getattr(arguments, n) for n in names}}


def _lines(name: str) -> list[str]:
    """The prompts of a file."""
    try:
        if name == "-" and sys.stdin is None:
            raise InputError("--input - can't be read: standard input is closed")
        text = (sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise InputError(f"--input {name} can't be read: {reason}") from error
    if not text:
        raise InputError(f"--input {name} is empty: give it a prompt in each line")
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def _on_a_line(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")


def _converse(arguments: Generate, run: Any) -> None:
    """Prompts from standard input, one line each, until its end. At a terminal an error about one ends nothing."""
    from lm import api

    if sys.stdin is None:
        raise InputError("--interactive reads standard input, which is closed: leave it open, or use --prompt")
    asking = sys.stdin.isatty()
    while True:
        if asking:
            print("> ", end="", flush=True)
        try:
            if not (line := sys.stdin.readline()):
                return
            prompt = line.rstrip("\n")
            pieces = api.stream(
                run, prompt, max_tokens=arguments.max_tokens, stop_ids=arguments.stop_ids, **_draws(arguments)
            )
        except (InputError, UnicodeDecodeError) as error:
            said = error if isinstance(error, InputError) else InputError("a prompt is not UTF-8: mend it")
            if not asking:
                raise said from error
            print(f"error: {said}", file=sys.stderr)
            continue
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)
