"""What users call: preset, train, load, evaluate, generate. Commands, notebooks and scripts all go through here."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

import jax
from jax.sharding import Mesh, NamedSharding
from rich.console import Console

from lm import checkpoint, compilation, generation, streaming
from lm.beams import Search
from lm.checkpoint import Loaded
from lm.config import InputError, ParallelConfig, RunConfig
from lm.data.corpus import Corpus
from lm.data.pairs import sides
from lm.data.sources.token_files import TokenFiles
from lm.evaluation.pairs import PairEvaluator
from lm.evaluation.perplexity import Evaluator, Scores
from lm.evaluation.surprisal import SurprisalWriter
from lm.evaluation.tasks import Task, TaskEvaluator, TaskScores
from lm.evaluation.writing import Decoding
from lm.fields import nearest
from lm.generation import Candidate, TextModel
from lm.interop import huggingface
from lm.observe.bar import Bar
from lm.observe.terminal import Terminal
from lm.observe.writers import ConsoleWriter, JsonlWriter, TensorBoardWriter, WandbWriter, Writer
from lm.parallel import RULES, Rules, make_mesh, rules_of
from lm.processes import hosts, watch
from lm.run_directory import locked
from lm.sampling import Sampling
from lm.scored_text import ScoredText, check_protocol, open_text, tokenizer_of, window_and_stride
from lm.training.conclusion import conclude, final_evaluation, score
from lm.training.run import run as run_training
from lm.training.signals import StopRequest, decided
from lm.training.start import Start, prepare
from lm.training.texts import Progress, Tokenizers, pair_store_of, separator_of, store_of

__all__ = ["Candidate", "Loaded", "Scores", "TaskScores", "evaluate", "evaluate_task", "generate", "load", "n_best"]
__all__ += ["preset", "preset_names", "stream", "train"]

METRICS = "metrics.jsonl"


def preset(name: str) -> RunConfig:
    """The config of a preset: the stem of a file in configs/, or the path of a .py file with a `get_config()`.

    Raises InputError for a name that isn't there (with the nearest that is) and a file that gives no RunConfig.
    """
    path = Path(name) if name.endswith(".py") else _presets_folder() / f"{name}.py"
    if not path.is_file():
        if name.endswith(".py"):
            raise InputError(f"there is no preset file {name}")
        raise InputError(f"no preset {name!r}{nearest(name, preset_names())}; there are {', '.join(preset_names())}")
    spec = importlib.util.spec_from_file_location(f"lm_preset_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
        config = module.get_config() if hasattr(module, "get_config") else None
    except Exception as error:  # whatever the user's own code raises
        raise InputError(f"{path} can't be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(config, RunConfig):
        raise InputError(f"{path} is not a preset: it needs a function get_config() that returns an lm RunConfig")
    return config


def _presets_folder() -> Path:
    """configs/: beside the package when installed, beside the checkout's lm/ when run from it."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def preset_names() -> list[str]:
    """The presets that come with lm."""
    return sorted(path.stem for path in _presets_folder().glob("*.py") if path.stem != "__init__")


def train(config: RunConfig, workdir: str | Path) -> Loaded:
    """Trains a run to the end of its budget, continuing what `workdir` holds, and evaluates it; what train.py calls.

    Returns the trained model. Raises InputError before anything compiles if config, text, devices or workdir don't fit;
    SystemExit(143 or 130) after saving, if stopped by SIGTERM or Ctrl-C. Of several processes all make the call; the
    parameters that it returns lie over all of them.
    """
    compilation.keep()
    workdir, console = Path(workdir), Terminal(quiet=not hosts.is_first())
    watch.continues(lambda: _to_continue(workdir))

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    with contextlib.ExitStack() as held:
        there = workdir.is_dir()
        if there and hosts.is_first():
            held.enter_context(locked(workdir))
        with Bar(console) as bar:
            start = prepare(config, workdir, say, load=load, progress=bar)
        if not there and hosts.is_first():
            workdir.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(workdir))
            if any(workdir.iterdir()):  # another process began one, and ended, while this one read the text
                raise InputError(f"another process has begun a run in {workdir}: give the command again to continue it")
        writers = _Writers(start, workdir, console)
        with StopRequest() as stop:
            try:
                run_training(start, workdir, write=writers.write, say=say, stop=stop)
            finally:
                writers.close()
            decided(0.0, stop)  # a signal since the last step
        if stop.signal is not None:
            say(f"stopped    by {signal.Signals(stop.signal).name}; saved in {workdir}; the same command continues")
            raise SystemExit(128 + stop.signal)
        # What was split over devices needn't fit one of them.
        split = hosts.count() > 1 or config.parallel.fsdp * config.parallel.tensor > 1
        mesh = make_mesh(config.parallel) if split else None
        run = checkpoint.load(workdir, mesh=mesh, rules=rules_of(config.parallel))
        run = dataclasses.replace(run, config=start.config)  # its evaluation may have changed
        result = final_evaluation(run, start, workdir, say)
    if hosts.is_first():
        conclude(run, start, result, workdir, say)
    return run


def _to_continue(workdir: Path) -> str:
    """What is said where a run ends because another of its processes is gone."""
    step = checkpoint.latest_step(workdir)
    last = "No checkpoint was written yet" if step is None else f"The last checkpoint is of step {step}, in {workdir}"
    return f"{last}; the same command continues, with any number of processes"


def load(
    path: str | Path,
    *,
    step: str | int = "latest",
    dtype: str = "float32",
    mesh: Mesh | None = None,
    rules: Rules = RULES,
) -> Loaded:
    """Opens a model: a run directory, one checkpoint inside it, written on any number of devices of any kind, or a
    Hugging Face model folder.

    Its params are the weights that the run was evaluated with: their moving average where `training.ema_decay` is set.

    Args:
      step: "latest", "best" (by evaluation.best) or a number, for a run directory.
      dtype: it computes in float32 unless this says "bfloat16" (parameters are cast too) or "tensorfloat32".
      mesh: of `lm.parallel.make_mesh`, to lay the parameters out over: each process reads what its devices hold, so
        that none need hold all, and all processes of the mesh make the call. None: this process's first device.
      rules: of `lm.parallel.rules_of`, which axes of the mesh split which axes of arrays.
    """
    if dtype not in ("float32", "bfloat16", "tensorfloat32"):
        raise InputError(f"dtype is {dtype!r}: use 'float32', 'bfloat16' or 'tensorfloat32'")
    compilation.keep()
    if huggingface.is_folder(path):
        if step != "latest":
            raise InputError(f"{path} is a Hugging Face model folder: it has no step {step}, leave the step out")
        run = huggingface.load(path, dtype="bfloat16" if dtype == "bfloat16" else "float32", mesh=mesh, rules=rules)
    else:
        cast = "bfloat16" if dtype == "bfloat16" else None
        run = checkpoint.load(path, step=step, dtype=cast, mesh=mesh, rules=rules)
    # auto: the back end that it was trained with may not run here
    model = dataclasses.replace(run.config.model, compute_dtype=dtype, attention="auto")  # type: ignore[arg-type]
    return dataclasses.replace(run, config=dataclasses.replace(run.config, model=model))


def evaluate(
    run: Loaded,
    data: str | ScoredText | None = None,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    score_eos: bool = False,
    tokens: TextIO | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Perplexity of a model on a source of text, each document's every token scored once.

    Of an encoder–decoder that is every token of every target, EOS included, given its source.

    It is computed on the mesh that the model was loaded onto, else on all devices, each with a copy of the parameters.
    Where the devices are of several processes, all make the call, and all get the result.

    Args:
      data: a source of text, or the name of one of the run's validation texts; None: the first of these.
      window: the longest input the model sees, in tokens; None: as in the run's config.
      stride: new tokens each window scores; None: as in the run's config, or the window where one is given.
      batch_size: windows at a time; changes no result.
      score_eos: score an EOS behind every document too; that of targets is always scored.
      tokens: gets the surprisal of every token, a line a document: see `lm.evaluation.surprisal`.
      progress: called with (what is being done, how much of it is done, how much there is).
    """
    config, tokenizer = run.config, tokenizer_of(run)
    check_protocol(run, window, stride, score_eos)
    text = data if isinstance(data, ScoredText) else open_text(run, data, progress)
    batch_size = config.evaluation.batch_size if batch_size is None else batch_size
    mesh = _mesh_of(run)
    evaluator: Evaluator | PairEvaluator
    if config.model.has_encoder:
        pairs = pair_store_of(text.text, Tokenizers(tokenizer, run.source_tokenizer), config, progress)
        scored: Corpus | TokenFiles = sides(text.text)[1]
        store = pairs.targets
        evaluator = PairEvaluator(
            config.model, pairs, tokenizer, run.source_tokenizer, batch_size=batch_size, mesh=mesh
        )
    else:
        window, stride = window_and_stride(run, window, stride)
        scored, store = text.text, store_of(text.text, tokenizer, config, progress)
        evaluator = Evaluator(
            config.model,
            store,
            tokenizer,
            window=window,
            stride=stride,
            batch_size=batch_size,
            mesh=mesh,
            score_prompts=text.score_prompts,
            score_eos=score_eos,
        )
    if mesh.is_multi_process:
        hosts.barrier("the text to score", hosts.LONG)  # where one has its tokens yet to make
        hosts.same("evaluation", json.dumps({**evaluator.protocol, "data": None, "rows": evaluator.rows}))
    tell = None if progress is None else functools.partial(progress, f"scoring under {run.path}")
    each = None if tokens is None else SurprisalWriter(tokens, scored, store, tokenizer)
    return score(run, evaluator, mesh, tell, each)


def evaluate_task(
    run: Loaded,
    task: Task,
    data: str | ScoredText | None = None,
    *,
    num_beams: int = 1,
    length_penalty: float | None = None,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> TaskScores:
    """Has a model write the second side of each pair from the first, and scores that: BLEU and chrF, or ROUGE.

    Args:
      task: "translation" or "summarization".
      data: a source of pairs, or the name of one of the run's validation texts; None: the first of these.
      num_beams: of the search; 1 is greedy.
      length_penalty: the power of its length that a beam's log-probability is divided by; None: 1.
      max_tokens: new ones for a pair at most; None: evaluation.task_max_tokens of the run's config.
      batch_size: pairs at a time; changes no result. None: as in the run's config.
      progress: called with (what is being done, how much of it is done, how much there is).

    Raises InputError where the text has no pairs, what scores them isn't installed, or the model has no room for them.
    """
    text = data if isinstance(data, ScoredText) else open_text(run, data, progress)
    evaluator = task_evaluator(
        run,
        task,
        text,
        num_beams=num_beams,
        length_penalty=length_penalty,
        max_tokens=max_tokens,
        batch_size=batch_size,
    )
    return evaluator(run, None if progress is None else functools.partial(progress, f"writing by {run.path}"))


def task_evaluator(
    run: Loaded,
    task: Task,
    text: ScoredText,
    *,
    num_beams: int = 1,
    length_penalty: float | None = None,
    max_tokens: int | None = None,
    batch_size: int | None = None,
) -> TaskEvaluator:
    """What `evaluate_task` calls: all that can be wrong is found out here, before anything is written."""
    tokenizer_of(run)
    evaluation = run.config.evaluation
    decoding = Decoding(
        evaluation.task_max_tokens if max_tokens is None else max_tokens,
        num_beams,
        length_penalty,
        evaluation.batch_size if batch_size is None else batch_size,
    )
    evaluator = TaskEvaluator(task, text.text, decoding, pair_separator=separator_of(run.config))
    evaluator.check(run)
    return evaluator


def _mesh_of(run: Loaded) -> Mesh:
    """The mesh that the parameters lie on; a mesh of all devices where they lie on a single one."""
    place = jax.tree.leaves(run.params)[0].sharding
    if isinstance(place, NamedSharding) and isinstance(place.mesh, Mesh):
        return place.mesh
    return make_mesh(ParallelConfig())


def generate(
    run: Loaded,
    prompts: Sequence[str],
    *,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    num_beams: int = 1,
    length_penalty: float | None = None,
    early_stopping: bool | Literal["never"] = False,
    batch_size: int | None = None,
) -> list[str]:
    """The continuations of the prompts, without them, or of an encoder_decoder what it writes for sources.

    Each goes up to EOS, an id or a text to stop at, or `max_tokens` tokens.

    Args:
      max_tokens: None: 128, or what learned positions leave room for.
      temperature: 0 is greedy; None: 1. top_k, top_p, min_p, repetition_penalty: see `lm.sampling.Sampling`.
      stop, stop_ids: texts and ids to stop at, which aren't given back.
      seed: a text depends on its prompt, its index and this, or on its own one of `seeds`.
      num_beams: 2 or more search for the likeliest text instead of drawing one. length_penalty (None: 1) and
        early_stopping: see `lm.beams.Search`.
      batch_size: prompts at a time; changes no result. None: all.

    Raises InputError on options that contradict each other, a prompt longer than the model's context, and where there
    isn't enough memory for keys and values.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if num_beams != 1:
        drawing = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seeds": seeds}
        _refuse_draws(num_beams, drawing)
        several = n_best(
            run,
            prompts,
            num_beams=num_beams,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            repetition_penalty=repetition_penalty,
            max_tokens=max_tokens,
            stop=stop,
            stop_ids=stop_ids,
            batch_size=batch_size,
        )
        return [found[0].text for found in several]
    if length_penalty is not None or early_stopping:
        raise InputError("length_penalty and early_stopping are of a beam search: use num_beams 2 or more with them")
    model = _text_model(run)
    return generation.generate(
        *model[:3],
        prompts,
        source_tokenizer=model.source_tokenizer,
        context=model.context,
        max_tokens=max_tokens,
        sampling=_sampling(temperature, top_k, top_p, min_p, repetition_penalty),
        seed=seed,
        seeds=seeds,
        stop=[stop] if isinstance(stop, str) else stop,
        stop_ids=stop_ids,
        batch_size=batch_size,
    )


def n_best(
    run: Loaded,
    prompts: Sequence[str],
    *,
    num_beams: int = 4,
    num_return: int = 1,
    length_penalty: float | None = None,
    early_stopping: bool | Literal["never"] = False,
    repetition_penalty: float | None = None,
    max_tokens: int | None = None,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    batch_size: int | None = None,
) -> list[list[Candidate]]:
    """The best texts that a beam search finds for each prompt, or source, the best first, as (text, score).

    The score is the text's log-probability, in nats, over tokens^length_penalty (None: 1). The rest is as for
    `generate`.
    """
    model = _text_model(run)
    power = 1.0 if length_penalty is None else length_penalty
    return generation.n_best(
        *model[:3],
        [prompts] if isinstance(prompts, str) else prompts,
        Search(num_beams, power, early_stopping, num_return, repetition_penalty),
        source_tokenizer=model.source_tokenizer,
        context=model.context,
        max_tokens=max_tokens,
        stop=[stop] if isinstance(stop, str) else stop,
        stop_ids=stop_ids,
        batch_size=batch_size,
    )


def stream(
    run: Loaded,
    prompt: str,
    *,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    seed: int = 0,
) -> Iterator[str]:
    """The text that `generate` gives for a prompt, piece by piece as it is written, in whole characters."""
    return streaming.stream(
        _text_model(run),
        prompt,
        max_tokens=max_tokens,
        sampling=_sampling(temperature, top_k, top_p, min_p, repetition_penalty),
        seed=seed,
        stop=[stop] if isinstance(stop, str) else stop,
        stop_ids=stop_ids,
    )


def _text_model(run: Loaded) -> TextModel:
    data, model = run.config.data, run.config.model
    # A published model's data.context is how long rows are by default, not how far it reaches.
    context = data.source_length if model.has_encoder and run.step is not None else model.position_rows
    return TextModel(run.params, model, tokenizer_of(run), run.source_tokenizer, context)


def _sampling(temperature: float | None, *others: Any) -> Sampling:
    return Sampling(1.0 if temperature is None else temperature, *others)


def _refuse_draws(num_beams: int, drawing: dict[str, Any]) -> None:
    """Raises InputError on options that a beam search doesn't have."""
    given = [name for name, value in drawing.items() if value is not None and (name, value) != ("temperature", 0)]
    if given:
        raise InputError(
            f"num_beams is {num_beams}, and a beam search takes the likeliest text: {given[0]} has no effect on it, "
            "leave it out or use num_beams 1"
        )


class _Writers:
    """All that take the metrics of a run, opened at the first record: a run that is complete leaves them alone."""

    def __init__(self, start: Start, workdir: Path, console: Console):
        self._open = functools.partial(_open_writers, start, workdir, console)
        self._writers: list[Writer] = []

    def write(self, record: dict[str, Any]) -> None:
        if not hosts.is_first():
            return
        self._writers = self._writers or self._open()
        for writer in self._writers:
            if "start" in record:
                writer.start(record)
            else:
                writer.write(record)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def _open_writers(start: Start, workdir: Path, console: Console) -> list[Writer]:
    cfg, resume_step = start.config, start.step if start.resume_from else None
    writers: list[Writer] = [ConsoleWriter(start.budget.steps, start.budget.seconds, console=console)]
    if cfg.observe.tensorboard:
        writers.append(TensorBoardWriter(workdir / "tensorboard", resume_step))
    if cfg.observe.wandb_project:
        writers.append(WandbWriter(cfg.observe.wandb_project, workdir, dataclasses.asdict(cfg)))
    return [*writers, JsonlWriter(workdir / METRICS, resume_step)]
