"""config.json of a Hugging Face model <-> ModelConfig, for the families of models that both sides can express."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm.config import InputError, ModelConfig
from lm.fields import nearest
from lm.interop.huggingface_families import FAMILIES, Family
from lm.interop.huggingface_fields import Fields
from lm.interop.huggingface_rotary import pattern
from lm.interop.huggingface_t5 import check_others

NAME = "config.json"
_OF_IMAGES = {"text_config", "vision_config", "mm_tokens_per_image"}
_OF_IMAGES |= {f"{name}_token_{end}" for name in ("boi", "eoi", "image") for end in ("index", "id")}
_TRAINING_ALONE = {"compute_dtype", "dropout", "hidden_dropout", "init_std", "initializer", "remat", "scan_layers"}
_TRAINING_ALONE |= {"attention", "vocab_multiple", "start_id", "zero_init_outputs"}
"""Fields of ModelConfig that say nothing of the function that the parameters make."""


MOST_LAYERS = 10_000
"""More are a broken file: lists of them would be made before anything else is checked."""


def read(values: Mapping[str, Any], where: Path | str) -> tuple[Family, ModelConfig]:
    """The family and the model of a config.json. The vocabulary isn't padded, and it computes in float32.

    Raises InputError for an unknown architecture, a field that is missing or of another type, and, by name and value,
    for each that would change the result and isn't implemented. Warns of fields that are unknown.
    """
    if values.get("model_type") == "gemma3":  # with images: its text model alone
        text = values.get("text_config")
        if not isinstance(text, Mapping):
            raise InputError(f"{where} has model_type 'gemma3' and no text_config: the text model isn't described")
        outer = {name: value for name, value in values.items() if name not in _OF_IMAGES}
        values = {**outer, **text, "model_type": "gemma3_text"}
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        check_others(values, where)
        raise InputError(
            f"{where}: model_type {kind!r} is not known{nearest(str(kind), FAMILIES)}; known are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    fields = Fields(values, family.defaults, where)
    for name in ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers"):
        given = values.get(name)
        if given is not None and not (type(given) is int and 1 <= given <= MOST_LAYERS):
            raise InputError(f"{where}: {name} is {given!r}, not a number of layers (1 to {MOST_LAYERS})")
    try:
        cfg = family.read(fields)
    except (TypeError, AttributeError, ZeroDivisionError, OverflowError, StopIteration) as error:
        raise InputError(f"{where} holds a value that no model can have: {error or 'no layers'}") from error
    fields.check_rest(family.harmless)
    return family, cfg


def write(cfg: ModelConfig, name: str | None = None) -> tuple[Family, dict[str, Any]]:
    """The family that a resolved config is of, the first that fits unless named, and its config.json without token ids.

    Raises InputError, naming the fields, where no family (or not the one named) makes the same model of it.
    """
    if name is not None and name not in FAMILIES:
        raise InputError(f"no family {name!r}{nearest(name, FAMILIES)}; there are {', '.join(FAMILIES)}")
    conflicts: dict[str, dict[str, tuple[Any, Any]]] = {}
    for family in FAMILIES.values() if name is None else [FAMILIES[name]]:
        fields = {"architectures": [family.architecture], "model_type": family.model_type, **family.write(cfg)}
        asked, made = arithmetic(cfg), arithmetic(family.read(Fields(fields, family.defaults, "")))
        found = {key: (asked[key], made[key]) for key in asked if not _equal(asked[key], made[key])}
        if family.divided and cfg.d_model % cfg.num_heads:
            found["num_heads"] = (cfg.num_heads, f"a divisor of d_model {cfg.d_model}")
        if "positions" in found:  # of which these follow
            follow = ("max_positions", "rotary_", "relative_")
            found = {key: both for key, both in found.items() if not key.startswith(follow)}
        if "family" in found and name is None:  # another kind of model
            continue
        if not found:
            return family, fields
        conflicts[family.model_type] = found
    least = min(conflicts, key=lambda family: len(conflicts[family]))
    nowhere = [key for key in conflicts[least] if all(key in found for found in conflicts.values())]
    differs = ", ".join(
        f"model.{key} {_short(old)} (not {_short(new)})" for key, (old, new) in conflicts[least].items()
    )
    if name is not None:
        raise InputError(f"{name} doesn't have this model: it differs in {differs}")
    alone = ", ".join(f"model.{key} {_short(arithmetic(cfg)[key])}" for key in nowhere)
    raise InputError(
        f"no Hugging Face family has this model: of {least}, the nearest, it differs in {differs}"
        + (f"; no family at all has {alone}" if alone else "")
    )


def arithmetic(cfg: ModelConfig) -> dict[str, Any]:
    """All that decides the function that a model is, by field: derived values filled in, those without effect left out.

    Two configs with equal ones have the same parameters and the same logits.
    """
    found = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in _TRAINING_ALONE}
    stacks = [cfg.encoder, cfg] if cfg.has_encoder else [cfg]
    kinds = [one.layer_pattern[i % len(one.layer_pattern)] for one in stacks for i in range(one.num_layers)]
    found |= {"num_kv_heads": cfg.kv_heads, "head_dim": cfg.head_width, "d_ff": cfg.ff_width}
    found |= {"qkv_bias": cfg.has_qkv_bias, "attention_scale": cfg.score_scale, "window": [k.window for k in kinds]}
    turned = cfg.positions == "rotary"
    found["rotary_base"] = [k.rotary_base for k in kinds] if turned else None
    found["rotary_factor"] = [k.rotary_factor for k in kinds] if turned else None
    stretched = turned and any(k.rotary_factor != 1 for k in kinds)
    if not stretched:
        found["rotary_scaling"] = None
    if not stretched or cfg.rotary_scaling != "llama3":
        names = ("rotary_low_frequency_factor", "rotary_high_frequency_factor", "rotary_original_positions")
        found |= dict.fromkeys(names)
    if cfg.positions != "learned":
        found["max_positions"] = None
    if cfg.positions != "relative":
        found |= dict.fromkeys(("relative_buckets", "relative_max_distance"))
    found["encoder_layers"] = cfg.source_layers if cfg.has_encoder else None
    found["share_embeddings"] = cfg.share_embeddings or not cfg.has_encoder
    if found["share_embeddings"]:
        found["source_vocab_size"] = None
    return found


def read_file(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} can't be read: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} is not a JSON object")
    return values


def _short(value: Any) -> str:
    """A value; of one for each layer what repeats."""
    return repr(pattern(value) if isinstance(value, list) else value)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9)
    return one == other
