"""What happens before anything compiles: the run directory is looked at, the text opened, the config resolved.

Everything a user can get wrong is found out here, and nothing in the run directory is touched.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from lm import checkpoint
from lm.checkpoint import Loaded
from lm.config import InputError, ModelConfig, RunConfig
from lm.data.pipeline import Pipeline
from lm.data.tokenizer import Tokenizer
from lm.differences import differences, forbidden_on_resume
from lm.evaluation.tasks import check_task
from lm.fields import check_types
from lm.generation import prompt_ids, source_ids
from lm.manifest import read_manifest
from lm.nn.language_model import model_specs
from lm.parallel import check_batch, make_mesh, parameter_shardings, rules_of
from lm.processes import hosts
from lm.run_directory import CONFIG
from lm.sharded_attention import choice
from lm.token_generation import room
from lm.training.budget import Budget
from lm.training.replicated import check_devices
from lm.training.task import task_evaluator
from lm.training.texts import (
    Progress,
    Say,
    Tokenizers,
    Validation,
    pipeline_of,
    say_texts,
    splits_of,
    together,
    tokenizers_of,
    tokens_of,
    validation_key,
)
from lm.validation import validate


class Weights:
    """Parameters, to be taken once: kept for longer they would be a second model in memory."""

    def __init__(self, params: Any):
        self._params = [params]

    def take(self) -> Any:
        return self._params.pop()


@dataclasses.dataclass(frozen=True)
class Start:
    """All that a run starts from.

    `validation` holds each text by its name, "" for one without; the first says which checkpoint is best. `resume_from`
    is the checkpoint that the run continues, None for a new one; `initial` are the weights that a new one begins with.
    `source_tokenizer` is the encoder's own; None: there is no encoder, or it uses the same as the decoder.
    """

    config: RunConfig
    tokenizer: Tokenizer
    pipeline: Pipeline
    budget: Budget
    validation: Mapping[str, Validation]
    provenance: Mapping[str, str]
    resume_from: Path | None
    initial: Weights | None
    source_tokenizer: Tokenizer | None = None

    def save_tokenizers(self, folder: Path) -> None:
        """Writes the tokenizers' files into a folder."""
        checkpoint.save_tokenizers(folder, self.tokenizer, self.source_tokenizer)

    @property
    def step(self) -> int:
        """Updates already done."""
        return 0 if self.resume_from is None else read_manifest(self.resume_from).step


def prepare(
    config: RunConfig,
    workdir: Path,
    say: Say,
    *,
    load: Callable[..., Loaded],
    progress: Progress | None = None,
) -> Start:
    """Checks the config against itself, the devices, the run directory and the text. Raises InputError.

    Of several processes the first opens the text before the others do; what they found is the same, or this raises.

    Args:
        load: opens the model that a config goes on from, on a `mesh` where there are several processes.
    """
    check_types(config)
    _check_same_command(config, workdir)
    config, initial = _gone_on_from(config, workdir, load)
    validate(config)
    _check_extras(config)
    mesh = make_mesh(config.parallel)
    rules = rules_of(config.parallel)
    check_devices(config.parallel, mesh, jax.device_count())
    check_batch(config.training.batch_size, config.training.gradient_accumulation, mesh)
    source_length = config.data.source_length
    for length, training in ((config.data.context, True), (config.evaluation.window or config.data.context, False)):
        # raises where that back end can't
        choice(config.model, mesh, length=length, training=training, source_length=source_length)
    resume_from = _checkpoint_to_continue(config, workdir, say)
    with hosts.in_turn("the text"):
        splits = splits_of(config)
        used = tokenizers_of(config, splits, resume_from, progress) if initial is None else _tokenizers_of(initial)
        tokenizer, source_tokenizer = used
        config = _resolved(config, used)
        parameter_shardings(mesh, model_specs(config.model), rules)  # raises where the mesh doesn't divide it
        _check_sample(config, tokenizer, source_tokenizer)
        stores = [tokens_of(part.corpus, used, config, progress) for part in splits.train]
        validation = {
            name: Validation(text, tokens_of(text, used, config, progress)) for name, text in splits.validation.items()
        }
        _check_task(config, used, validation)
    provenance = {
        "data_sha256": together([store.corpus_sha256 for store in stores]),
        **{validation_key(name): each.store.corpus_sha256 for name, each in validation.items()},
        "tokenizer_sha256": tokenizer.sha256,
    }
    if source_tokenizer is not None:
        provenance["source_tokenizer_sha256"] = source_tokenizer.sha256
    if resume_from:
        _check_provenance(workdir, read_manifest(resume_from).provenance, provenance)
    with hosts.in_turn("the rows"):
        pipeline = pipeline_of(config, splits, stores, say)
    hosts.barrier("the rows of all", hosts.LONG)  # each has planned its own
    hosts.same("text or run", json.dumps({**provenance, "goes on from": str(resume_from)}))
    budget = Budget.of(
        config.training,
        warmup_steps=config.optimizer.warmup_steps,
        tokens_per_step=pipeline.tokens_per_step,
        rows_per_epoch=pipeline.rows_per_epoch,
    )
    say_texts(say, pipeline, splits, stores, validation, budget)
    if initial is not None:
        say(f"weights    from {initial.path}: {initial.num_parameters:,} parameters")
    weights = None if initial is None else Weights(initial.params)
    return Start(config, tokenizer, pipeline, budget, validation, provenance, resume_from, weights, source_tokenizer)


def _check_same_command(config: RunConfig, workdir: Path) -> None:
    """Raises InputError where processes were started with other arguments, or from other versions."""
    if hosts.count() == 1:
        return
    versions = {name: metadata.version(name) for name in ("lm", "jax", "jaxlib", "orbax-checkpoint", "numpy")}
    settings = {name: os.environ.get(name) for name in ("XLA_FLAGS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION")}
    hosts.same("environment", json.dumps({**versions, **settings}))
    hosts.same("config", json.dumps({**json.loads(config.to_json()), "--workdir": str(workdir)}))


def _gone_on_from(config: RunConfig, workdir: Path, load: Callable[..., Loaded]) -> tuple[RunConfig, Loaded | None]:
    """The config with the model and the tokenizer that it goes on from, and a new run's model itself."""
    if config.init_from is None:
        return config, None
    step = checkpoint.latest_step(workdir) if workdir.is_dir() else None
    if step is not None:
        saved = checkpoint.read_config(checkpoint.locate(workdir, step))
        if saved.init_from == config.init_from:
            return config.going_on_from(saved.model), None
    split = hosts.count() > 1 or config.parallel.fsdp * config.parallel.tensor > 1
    mesh = make_mesh(config.parallel) if split else None
    initial = load(config.init_from, mesh=mesh, rules=rules_of(config.parallel))
    if initial.tokenizer is None:
        raise InputError(f"--init-from {config.init_from} has no tokenizer: put its tokenizer.json or .model there")
    return config.going_on_from(initial.config.model), initial


def _tokenizers_of(initial: Loaded) -> Tokenizers:
    assert initial.tokenizer is not None, "looked at when it was opened"
    return Tokenizers(initial.tokenizer, initial.source_tokenizer)


def _resolved(config: RunConfig, used: Tokenizers) -> RunConfig:
    """The config with what the tokenizers decide. Raises InputError where they don't fit an encoder–decoder."""
    tokenizer, source = used
    config = config.resolve(tokenizer.vocab_size, None if source is None else source.vocab_size, tokenizer.first_id)
    if not config.model.has_encoder:
        return config
    if tokenizer.eos is None:
        raise InputError(
            f"the tokenizer ({tokenizer.kind}) has no EOS, by which an encoder_decoder ends what it writes: use one "
            "that has"
        )
    start = config.model.start_id
    if start is None or start >= config.model.vocabulary:
        raise InputError(
            f"model.start_id is {start}: give the id that targets follow, below {config.model.vocabulary}, or None for "
            "the tokenizer's BOS or EOS"
        )
    return config


def _checkpoint_to_continue(config: RunConfig, workdir: Path, say: Say) -> Path | None:
    """The latest checkpoint of the run in `workdir`, None where there is none yet."""
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"{workdir} is a file, not a directory: name another --workdir")
    there = next(folder for folder in (workdir, *workdir.absolute().parents) if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise InputError(
            f"{workdir} can't be written: {there} is no folder that can be written to; name another --workdir"
        )
    step = checkpoint.latest_step(workdir) if workdir.exists() else None
    if step is None:
        if workdir.exists() and any(workdir.iterdir()) and not (workdir / CONFIG).exists():
            raise InputError(f"{workdir} holds other files and no run: name an empty or new --workdir")
        return None
    found = checkpoint.locate(workdir, step)
    saved = checkpoint.read_config(found)
    wanted = dataclasses.replace(config, model=_with_derived(config, saved))
    forbidden = forbidden_on_resume(saved, wanted)
    if forbidden:
        listed = "\n".join(f"  {name}: {old!r} in the run, {new!r} now" for name, (old, new) in forbidden.items())
        raise InputError(
            f"{workdir} holds a run with another config:\n{listed}\n"
            "To continue this run, leave these fields as they were; to keep both, name another --workdir, where "
            f"--init-from {workdir} takes over its weights."
        )
    for name, (old, new) in differences(saved, wanted).items():
        say(f"changed    {name}: {old!r} -> {new!r}")
        if name == "training.steps":
            say("           the learning-rate schedule is rebuilt over the new length")
    return found


def _with_derived(config: RunConfig, saved: RunConfig) -> ModelConfig:
    """The model section with what the saved run derived in place of None, so that only choices are compared."""
    derived = {
        name: getattr(saved.model, name)
        for name in ("vocab_size", "source_vocab_size", "start_id", "max_positions")
        if getattr(config.model, name) is None
    }
    return dataclasses.replace(config.model, **derived)


def _check_extras(config: RunConfig) -> None:
    wanted = {
        "tensorboardX": ("observe.tensorboard", config.observe.tensorboard, "False"),
        "wandb": ("observe.wandb_project", config.observe.wandb_project is not None, "None"),
    }
    for package, (name, on, off) in wanted.items():
        if on and importlib.util.find_spec(package) is None:
            raise InputError(f"{name} needs the package {package}: pip install {package}, or set it to {off}")
    if config.evaluation.task is not None:
        check_task(config.evaluation.task)


def _check_task(config: RunConfig, used: Tokenizers, validation: Mapping[str, Validation]) -> None:
    if (evaluator := task_evaluator(config, validation, in_loop=False)) is not None:
        evaluator.check(Loaded(config, {}, used.tokenizer, 0, Path(), used.source))


def _check_sample(config: RunConfig, tokenizer: Tokenizer, source_tokenizer: Tokenizer | None) -> None:
    if config.observe.sample_prompt is None:
        return
    read = source_ids if config.model.has_encoder else prompt_ids
    tokens = len(read(source_tokenizer or tokenizer, config.observe.sample_prompt))
    left = room(config.model, tokens)
    if tokens == 0 or (left is not None and left < 1):
        limit = (
            "the tokenizer has no BOS or EOS to begin with" if not tokens else f"{config.model.position_rows} positions"
        )
        raise InputError(
            f"observe.sample_prompt has {tokens} tokens, and {limit}: give another prompt, or None for no sample"
        )


def _check_provenance(workdir: Path, saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    kinds = {"data": "training text", "validation": "validation text", "tokenizer": "tokenizer"}
    kinds["source"] = "tokenizer of sources"
    for name in now:
        what = kinds[name.partition("_")[0]]
        if saved.get(name) != now[name]:
            raise InputError(
                f"the {what} is not the one that the run in {workdir} began with (sha256 {now[name][:12]} now, "
                f"{str(saved.get(name))[:12]} in the run): bring it back, or name another --workdir"
            )
