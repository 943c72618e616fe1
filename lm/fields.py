"""The fields of dataclasses: built from JSON, and checked by the types they are declared with."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal


class InputError(ValueError):
    """The user's arguments or files are at fault. Commands print the message, way out included, and exit with 2."""


def nearest(name: str, names: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" for the closest of the names, or an empty string."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def build(cls: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """A dataclass from what JSON holds of it. Raises InputError for an unknown field or a wrong type, naming it."""
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        if name not in hints:
            raise InputError(f"unknown config field {prefix + name!r}{nearest(name, hints)}")
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise InputError(f"config section {prefix + name!r} is {value!r}, not an object")
            value = build(hints[name], value, f"{prefix}{name}.")
        if isinstance(value, list):  # JSON has no tuples
            value = tuple(value)
        arguments[name] = value
    built = cls(**arguments)
    check_types(built, prefix)
    return built


def check_types(config: Any, prefix: str = "") -> None:
    """Raises InputError, naming the field, where a value is not of its field's type."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(hint):
            if type(value) is not hint:
                raise InputError(f"{prefix}{name} is {value!r}, not a {typing.cast(type, hint).__name__}")
            check_types(value, f"{prefix}{name}.")
        elif not _is_a(value, hint):
            raise InputError(f"{prefix}{name} is {value!r}, it must be {_describe(hint)}")


def _is_a(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is_a(value, option) for option in typing.get_args(hint))
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_a(one, typing.get_args(hint)[0]) for one in value)
    if origin is Literal:
        return isinstance(value, str) and value in typing.get_args(hint)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"several of {_describe(typing.get_args(hint)[0])}"
    return {int: "a whole number", float: "a number", bool: "True or False", str: "text", type(None): "None"}[hint]
