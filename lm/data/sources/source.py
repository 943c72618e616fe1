"""How a source of text is written: strings -> small frozen descriptions. Nothing is opened here.

    builtin:python-stdlib       tfds:NAME[/CONFIG][@VERSION][#FEATURE]       text:GLOB       tokens:GLOB
    jsonl:GLOB#FIELD            parquet:GLOB#FIELD
    pairs:GLOB.tsv              pairs:SOURCE_FILE,TARGET_FILE                pairs:{tfds,jsonl,parquet}:...#FIELD,FIELD
    mix:WEIGHT*SOURCE+WEIGHT*SOURCE

Each but a mix may end in a split, `SOURCE[train]`; a set to validate on may have a name in front, `NAME=SOURCE`.
"""

from __future__ import annotations

import dataclasses
import math
import re

from lm.config import InputError
from lm.fields import nearest

KINDS = ("builtin", "tfds", "text", "jsonl", "parquet", "tokens", "pairs", "mix")
BUILTINS = ("python-stdlib",)
_WITH_FIELDS = ("tfds", "jsonl", "parquet")
_WITH_SLICES = ("builtin", "tfds")
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"


@dataclasses.dataclass(frozen=True)
class Source:
    """One place of text.

    Attributes:
        base: the source as it is written, without its split.
        kind: what reads it: builtin, tfds, text, jsonl, parquet, tokens, tsv (pairs in a file) or lines (in two).
        place: a dataset's name, a glob, or two files with a comma between.
        fields: the columns or features to read, in pairs two; empty: the default one.
        split: what is written in the brackets at the end.
    """

    base: str
    kind: str
    place: str
    fields: tuple[str, ...] = ()
    split: str | None = None


@dataclasses.dataclass(frozen=True)
class Weighted:
    """A component of a mix. Weights are positive, of any scale."""

    weight: float
    source: Source


def parse(written: str) -> tuple[Weighted, ...]:
    """The components of a source: of any but a mix one, of weight 1.

    Raises:
        InputError: an unknown kind, or a form that its kind doesn't have.
    """
    if not written.startswith("mix:"):
        return (Weighted(1.0, _source(written)),)
    # Globs may hold + and *: a component begins at a + that stands before NUMBER*KIND:.
    parts = re.split(rf"\+(?={_NUMBER}\*[a-z]+:)", written.removeprefix("mix:"))
    components = tuple(_component(written, part) for part in parts)
    *others, last = (component.source.split for component in components)
    if others and last in ("train", "validation") and not any(others):
        raise InputError(
            f"{written}: is [{last}] the split of all components, or of the last? Write it after each component, or "
            "put the one it belongs to first"
        )
    return components


def parse_named(written: str) -> tuple[str, str]:
    """NAME=SOURCE -> (NAME, SOURCE); without a name ("", SOURCE)."""
    matched = re.fullmatch(rf"([A-Za-z0-9_.-]+)=((?:{'|'.join(KINDS)}):.*)", written, re.DOTALL)
    return (matched[1], matched[2]) if matched else ("", written)


def _component(written: str, part: str) -> Weighted:
    matched = re.fullmatch(rf"({_NUMBER})\*(.+)", part, re.DOTALL)
    if not matched:
        raise InputError(
            f"{written}: {part!r} is not WEIGHT*SOURCE: write a mix as in mix:0.7*text:a.txt+0.3*text:b.txt"
        )
    weight = float(matched[1])
    if not 0 < weight < math.inf:
        raise InputError(f"{written}: the weight {matched[1]} must be more than 0 and finite; leave out what has none")
    if matched[2].startswith("mix:"):
        raise InputError(f"{written}: a mix can't be part of a mix: multiply the weights out into one")
    return Weighted(weight, _source(matched[2]))


def _source(written: str) -> Source:
    kind, colon, rest = written.partition(":")
    if not colon or kind not in KINDS:
        raise InputError(
            f"unknown source of text {written!r}{_meant(written)}: write builtin:python-stdlib, tfds:NAME, text:GLOB, "
            "jsonl:GLOB#FIELD, parquet:GLOB#FIELD, pairs:GLOB.tsv, tokens:GLOB or mix:0.7*SOURCE+0.3*SOURCE"
        )
    inner, colon, inside = rest.partition(":")
    if kind == "pairs" and colon and inner in _WITH_FIELDS:
        kind, rest = inner, inside
        return _pairs_of_fields(written, kind, rest)
    base, split = _split(written, kind)
    rest = base.partition(":")[2]
    if kind == "builtin" and rest not in BUILTINS:
        raise InputError(f"there is no built-in text {rest!r}{nearest(rest, BUILTINS)}: it is builtin:{BUILTINS[0]}")
    if kind == "pairs":
        return Source(base, _kind_of_pairs(base, rest), rest, (), split)
    place, field = _field(kind, rest)
    if kind == "tfds" and not place:
        raise InputError(f"{base} names no dataset: write tfds:NAME")
    return Source(base, kind, place, (field,) if field else (), split)


def _pairs_of_fields(written: str, kind: str, rest: str) -> Source:
    base, split = _split(written, kind)
    place, field = _field(kind, base.split(":", 2)[2])
    fields = tuple(field.split(","))
    if len(fields) != 2 or not all(fields):
        raise InputError(f"{base} needs the two sides of a pair at its end, as in pairs:{kind}:{place}#en,de")
    return Source(base, kind, place, fields, split)


def _kind_of_pairs(base: str, rest: str) -> str:
    if rest.count(",") == 1 and all(rest.split(",")):
        return "lines"
    if re.search(r"\.tsv(\.(gz|xz|zst))?$", rest):
        return "tsv"
    raise InputError(
        f"{base} is no source of pairs: write pairs:GLOB.tsv (source TAB target), pairs:SOURCE_FILE,TARGET_FILE (line "
        "by line), or pairs:jsonl:GLOB#SOURCE,TARGET, and so for parquet: and tfds:"
    )


def _split(written: str, kind: str) -> tuple[str, str | None]:
    """SOURCE[SPLIT] -> (SOURCE, SPLIT). A glob may end in a set of characters, so only two names are splits there."""
    split = r"(?:[^\[\]]|\[[^\[\]]*\])*" if kind in _WITH_SLICES else r"train|validation"
    matched = re.fullmatch(rf"(.+?)\[({split})\]", written, re.DOTALL)
    return (matched[1], matched[2]) if matched else (written, None)


def _field(kind: str, rest: str) -> tuple[str, str]:
    """PLACE#FIELD -> (PLACE, FIELD). Folders may have a # in their names."""
    place, sharp, field = rest.rpartition("#")
    if kind not in _WITH_FIELDS or not sharp or "/" in field:
        return rest, ""
    return place, field


def _meant(written: str) -> str:
    kind, colon, rest = written.partition(":")
    if colon and not rest.startswith("//"):
        named = re.match(r"[A-Za-z0-9_.-]+=", kind)
        return " (only a source of data.validation has a name)" if named else nearest(kind, KINDS)
    suffixes = (("jsonl", "jsonl"), ("json", "jsonl"), ("parquet", "parquet"), ("bin", "tokens"), ("npy", "tokens"))
    kinds = [kind for suffix, kind in (*suffixes, ("tsv", "pairs")) if f".{suffix}" in written]
    return f" (for a file, {(kinds or ['text'])[0]}:{written})"
