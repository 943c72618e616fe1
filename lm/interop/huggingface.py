"""Hugging Face model folders, opened and written without torch and transformers: config, weights, tokenizer."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from lm.checkpoint import Loaded
from lm.config import DataConfig, InputError, ModelConfig, RunConfig, TokenizerConfig
from lm.interop import huggingface_config, huggingface_tokenizer, weights
from lm.interop.huggingface_weights import HEAD, canonical, copies, embedding, prefixed
from lm.interop.huggingface_weights import weights as family_weights
from lm.interop.safetensors_files import FLOATS, Tensor, open_folder, same_bytes, write_folder
from lm.manifest import MANIFEST, write_atomically
from lm.parallel import RULES, Rules
from lm.run_directory import CHECKPOINTS
from lm.validation import validate

LONGEST_ROW = 1024
"""data.context of an opened model, in tokens, if it has more positions."""
MAX_SHARD_BYTES = 5_000_000_000
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def is_folder(path: str | Path) -> bool:
    """Whether a path is a folder with a model that isn't ours: a config.json that names an architecture, or weights."""
    path = Path(path)
    if not path.is_dir() or (path / MANIFEST).exists() or (path / CHECKPOINTS).exists():
        return False
    if any(path.glob("*.safetensors")) or any((path / name).exists() for name in _PICKLED):
        return True
    config = path / huggingface_config.NAME
    return config.is_file() and "schema_version" not in huggingface_config.read_file(config)


def load(path: str | Path, *, dtype: str = "float32", mesh: Mesh | None = None, rules: Rules = RULES) -> Loaded:
    """Opens a folder: config.json as transformers 4 or 5 writes it, *.safetensors, and a tokenizer if there is one.

    Args:
      dtype: of the parameters, "float32" or "bfloat16", whatever the files have.
      mesh: where they are to lie, by the rules; None: on this process's first device. Tables are padded with rows to
        what their axis of the mesh divides.

    Raises InputError for an architecture or a field that isn't implemented, and for files that are broken or don't fit
    one another. `data.context` is the model's positions, at most LONGEST_ROW; `step` is None.
    """
    folder = Path(path)
    config = folder / huggingface_config.NAME
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: name one with config.json and *.safetensors")
    if not config.is_file():
        raise InputError(f"{folder} has no {config.name}: the weights alone don't say what model they are")
    values = huggingface_config.read_file(config)
    family, model = huggingface_config.read({**values, **huggingface_tokenizer.start(folder, values)}, config)
    tensors = _tensors(folder, model)
    model = _without_copies(model, family.model_type, tensors)
    if mesh is not None:
        parts = math.prod(mesh.shape[axis] for axis in rules["vocab"])
        model = dataclasses.replace(model, vocab_multiple=math.lcm(model.vocab_multiple, parts))
    packing = "best_fit" if model.has_encoder else DataConfig.packing
    run = RunConfig(model=model, data=DataConfig(context=min(model.position_rows, LONGEST_ROW), packing=packing))
    tokenizer = huggingface_tokenizer.load(folder, values, model.vocabulary)
    if tokenizer is not None:
        run = dataclasses.replace(run, tokenizer=TokenizerConfig(kind="file", path=str(folder)))
    try:
        validate(run)
    except InputError as error:
        raise InputError(f"{config} describes no model that can be built: {error}") from error
    wanted = list(family_weights(model, family.model_type))
    weights.check(wanted, tensors, folder)
    return Loaded(
        run, weights.read(model, wanted, tensors, dtype=dtype, mesh=mesh, rules=rules), tokenizer, None, folder
    )


def save(
    run: Loaded,
    path: str | Path,
    *,
    family: str | None = None,
    dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Writes a model as a folder that transformers opens, config and tokenizer included; returns the files.

    Args:
      path: a folder that is new or empty.
      family: a model_type; None: the first that the model fits.
      dtype: of the weights: "float32", "bfloat16" or "float16".

    Raises InputError, naming the fields, for a model that the family (or none) has, and for a folder that isn't empty.
    """
    folder, model = Path(path), run.config.model
    if dtype not in FLOATS:
        raise InputError(f"dtype is {dtype!r}: use one of {', '.join(FLOATS)}")
    if max_shard_bytes < 1:
        raise InputError(f"max_shard_bytes is {max_shard_bytes}: use 1 or more")
    model = _with_start(model, run)
    chosen, fields = huggingface_config.write(model, family)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there and not an empty folder: name a new one")
    folder.mkdir(parents=True, exist_ok=True)
    by_name = {prefixed(weight.name, chosen.model_type): weight for weight in family_weights(model, chosen.model_type)}
    files = write_folder(
        folder,
        {name: weight.shape for name, weight in by_name.items()},
        lambda name: by_name[name].take(run.params),
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )
    ids = huggingface_tokenizer.ids(run.tokenizer, model)
    contents: dict[str, dict[str, Any]] = {huggingface_tokenizer.GENERATION: {"_from_model_config": True, **ids}}
    if run.tokenizer is not None:
        files.append(huggingface_tokenizer.save(run.tokenizer, folder, model))
        contents[huggingface_tokenizer.CONFIG] = huggingface_tokenizer.describe(run.tokenizer, model, chosen.model_type)
    no_ids = {"bos_token_id": None, "eos_token_id": None}  # else they would be those that the family is known for
    contents[huggingface_config.NAME] = {**fields, **no_ids, **ids, "torch_dtype": dtype}
    for name, content in contents.items():  # config.json last: without it the folder is no model
        write_atomically(folder / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        files.append(folder / name)
    return files


def _with_start(model: ModelConfig, run: Loaded) -> ModelConfig:
    """The model with the id that its targets follow, which its config may leave to the tokenizer."""
    if not model.has_encoder or model.start_id is not None:
        return model
    start = None if run.tokenizer is None else run.tokenizer.first_id
    if start is None:
        raise InputError(
            "model.start_id is None, and there is no tokenizer with BOS or EOS to say what targets follow: set it in "
            "the run's config.json"
        )
    return dataclasses.replace(model, start_id=start)


def _tensors(folder: Path, model: ModelConfig) -> dict[str, Tensor]:
    """All tensors of the folder by canonical name, but those that aren't weights of the language model."""
    found: dict[str, Tensor] = {}
    for name, tensor in open_folder(folder).items():
        short = canonical(name)
        if short in found:
            raise InputError(f"{folder} has two tensors for {short}: {name} is one of them")
        if short is not None:
            found[short] = tensor
    if found:
        return found
    if any((folder / name).exists() for name in _PICKLED):
        opener = "AutoModelForSeq2SeqLM" if model.has_encoder else "AutoModelForCausalLM"
        raise InputError(
            f"{folder} has its weights as a pickle ({_PICKLED[0]}), which could run any code and is never opened. "
            f'Convert it where torch is installed: python -c "from transformers import {opener} as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\", and copy the tokenizer's files"
        )
    raise InputError(f"{folder} has no weights: *.safetensors is missing")


def _without_copies(model: ModelConfig, model_type: str, tensors: dict[str, Tensor]) -> ModelConfig:
    """Drops what the files have besides the embedding table and the model doesn't: a tied head, and T5's two sides.

    Such a tensor must be the table, and stands in for it where that is missing. A head of T5's that differs is one of
    its own, whatever the config says: transformers 5 writes tie_word_embeddings true there too. Returns the model.
    """
    table = next(w.name for w in family_weights(model, model_type) if w.path == embedding("", model).path)
    for name in copies(model, model_type):
        if name not in tensors:
            continue
        if table not in tensors:
            tensors[table] = tensors.pop(name)
        elif same_bytes(tensors[name], tensors[table]):
            del tensors[name]
        elif name == HEAD and model.has_encoder:
            model = dataclasses.replace(model, tie_embeddings=False)
        else:
            why = "set it to false in config.json" if name == HEAD else "the two sides of this model share one table"
            field = "tie_word_embeddings is true, but " if name == HEAD else ""
            raise InputError(f"{tensors[name].path}: {field}{name} differs from {table}: {why}")
    return model
