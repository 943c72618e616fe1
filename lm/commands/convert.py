"""python -m lm import, export: a Hugging Face folder as a run, and a model as such a folder."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from lm import cli, output


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
