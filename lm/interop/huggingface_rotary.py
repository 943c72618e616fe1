"""Rotary positions in a config.json: rope_theta and rope_scaling of transformers 4, rope_parameters of 5.

A layer with a sliding window reads the entry "sliding_attention", one without "full_attention", where there are such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lm.config import ModelConfig
from lm.interop.huggingface_fields import Fields

FULL, SLIDING = "full_attention", "sliding_attention"
_KNOWN = {
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


class Rotary(NamedTuple):
    """One kind of rotary positions. `rule` is None for unscaled ones, "linear", or "llama3" with its numbers."""

    base: float
    factor: float = 1.0
    rule: str | None = None
    low: float = 1.0
    high: float = 4.0
    original: int = 8192


def read_rotary(fields: Fields, windows: Sequence[int | None], *, by_layer_type: bool) -> dict[str, Any]:
    """The rotary fields of ModelConfig. `windows`: of every layer; `by_layer_type`: the family has
    rope_local_base_freq, the base of layers with a window."""
    given = fields.maybe("rope_parameters", dict) or {}
    scaling = fields.maybe("rope_scaling", dict) or {}
    theta = fields.get("rope_theta", float)
    local = fields.get("rope_local_base_freq", float) if by_layer_type else None
    full, sliding = given.get(FULL), given.get(SLIDING)
    if FULL in given or SLIDING in given or (local is not None and not given):
        full, sliding = {"rope_theta": theta, **(full or {}), **scaling}, sliding or {}
        rest = {name: value for name, value in given.items() if name not in (FULL, SLIDING)}
        if rest:
            raise fields.refuse("rope_parameters", rest, "stands beside entries by layer type, and is not implemented")
    else:
        if local is not None:
            raise fields.refuse("rope_parameters", given, f"lacks the entries {FULL} and {SLIDING}")
        full = sliding = {"rope_theta": theta, **(scaling or given)}
    kinds = {
        FULL: _kind(fields, full, theta),
        SLIDING: _kind(fields, sliding, theta if local is None else local),
    }
    used = [kinds[FULL if window is None else SLIDING] for window in windows]
    rules = {kind._replace(base=1.0, factor=1.0) for kind in used if kind.rule}
    if len(rules) > 1:
        raise fields.refuse("rope_parameters", given, "scales layers by different rules, which is not implemented")
    scaled = next(iter(rules), Rotary(1.0, rule="linear"))
    return {
        "rotary_base": pattern([kind.base for kind in used]),
        "rotary_factor": pattern([kind.factor for kind in used]),
        "rotary_scaling": scaled.rule,
        "rotary_low_frequency_factor": scaled.low,
        "rotary_high_frequency_factor": scaled.high,
        "rotary_original_positions": scaled.original,
    }


def write_rotary(cfg: ModelConfig, *, by_layer_type: bool) -> dict[str, Any]:
    """rope_theta and rope_scaling, which transformers 5 reads too; `by_layer_type` adds rope_local_base_freq."""
    kinds = [cfg.layer_pattern[i % len(cfg.layer_pattern)] for i in range(cfg.num_layers)]
    full = next((kind for kind in kinds if kind.window is None), kinds[0])
    first = full if by_layer_type else kinds[0]
    fields: dict[str, Any] = {"rope_theta": float(first.rotary_base), "rope_scaling": None}
    if by_layer_type:
        sliding = next((kind for kind in kinds if kind.window is not None), kinds[0])
        fields["rope_local_base_freq"] = float(sliding.rotary_base)
    if first.rotary_factor != 1:
        fields["rope_scaling"] = {"rope_type": cfg.rotary_scaling, "factor": float(first.rotary_factor)}
        if cfg.rotary_scaling == "llama3":
            fields["rope_scaling"] |= {
                "low_freq_factor": float(cfg.rotary_low_frequency_factor),
                "high_freq_factor": float(cfg.rotary_high_frequency_factor),
                "original_max_position_embeddings": cfg.rotary_original_positions,
            }
    return fields


def pattern(layers: Sequence[Any]) -> Any:
    """The shortest run that, repeated, gives the values of all layers: a tuple, or the value itself if it is one."""
    whole = next(n for n in range(1, len(layers) + 1) if all(v == layers[i % n] for i, v in enumerate(layers)))
    return layers[0] if whole == 1 else tuple(layers[:whole])


def _kind(fields: Fields, entry: Mapping[str, Any], theta: float) -> Rotary:
    rule = entry.get("rope_type", entry.get("type", "default"))
    if rule not in _KNOWN:
        raise fields.refuse("rope_scaling", rule, f"is not implemented; known are {', '.join(_KNOWN)}")
    for name, value in entry.items():
        neutral = value is None or (name == "partial_rotary_factor" and value == 1)
        if name not in {"rope_type", "type", "rope_theta", *_KNOWN[rule]} and not neutral:
            raise fields.refuse(f"rope_scaling of type {rule}: {name}", value, "is not implemented")
    numbers = Fields({**entry, "rope_theta": entry.get("rope_theta") or theta}, {}, f"{fields.where}: rope_scaling")
    base = numbers.get("rope_theta", float)
    if rule == "default":
        return Rotary(base)
    factor = numbers.get("factor", float)
    if rule == "linear":
        return Rotary(base, factor, rule)
    original = numbers.maybe("original_max_position_embeddings", int)
    return Rotary(
        base,
        factor,
        rule,
        numbers.get("low_freq_factor", float),
        numbers.get("high_freq_factor", float),
        fields.get("max_position_embeddings", int) if original is None else original,
    )
