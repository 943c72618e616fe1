"""What devices exchange in a compiled program, read from its HLO: kinds, dtypes, bytes, and how often."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

BITS = {"pred": 8, "bf16": 16, **{f"{kind}{bits}": bits for kind in "suf" for bits in (8, 16, 32, 64)}}
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One instruction. `bytes`: of the whole array or arrays that a group works on, at each of `times` executions: what
    an all-gather makes, what each device brings to a reduce-scatter, an all-reduce or an all-to-all, what one device
    sends in a collective-permute.

    shapes: of the result, on one device, as HLO writes them. members: the first group, as places in the mesh.
    """

    kind: str
    dtype: str
    bytes: int
    shapes: tuple[tuple[int, ...], ...]
    members: tuple[int, ...]
    times: int

    @property
    def group(self) -> int:
        """Devices that exchange with one another."""
        return len(self.members)

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all executions, by the algorithms that send the least (rings, for example)."""
        others = (self.group - 1) / self.group
        share = {"all-reduce": 2 * others, "collective-permute": 1.0}.get(self.kind, others)
        return self.times * self.bytes * share

    def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...]:
        """The mesh axes that the group runs along, of the sizes of all axes, the outermost first."""
        places = np.unravel_index(self.members, tuple(mesh.values()))
        return tuple(name for name, place in zip(mesh, places, strict=True) if len(set(place.tolist())) > 1)


def collectives(hlo: str) -> list[Collective]:
    """All collectives of a program: of `compiled.as_text()`, or, as they are asked for but without those that the
    compiler is still to insert, of `lowered.as_text("hlo")`.

    The body of a loop counts as often as it runs, which must be known, and every branch of a conditional once. An
    all-reduce is named so: it sends what a reduce-scatter and an all-gather of the same array do.
    """
    bodies = dict(_computations(hlo))
    entry = re.search(r"^ENTRY %?([\w.\-]+)", hlo, re.MULTILINE)
    assert entry, "no entry computation: this is no HLO"
    return list(_inside(bodies, entry[1], 1))


def by_kind(found: Iterable[Collective]) -> dict[tuple[str, str], int]:
    """Bytes in all executions, by kind and dtype."""
    total: dict[tuple[str, str], int] = {}
    for one in found:
        total[one.kind, one.dtype] = total.get((one.kind, one.dtype), 0) + one.times * one.bytes
    return total


def _computations(hlo: str) -> Iterator[tuple[str, list[str]]]:
    name = ""
    lines: list[str] = []
    for line in hlo.splitlines():
        opened = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$|(?:ENTRY )?%?([\w.\-]+) \{$", line)
        if opened:
            name, lines = opened[1] or opened[2], []
        elif line.startswith("}"):
            yield name, lines
        else:
            lines.append(line)


def _inside(bodies: dict[str, list[str]], name: str, times: int) -> Iterator[Collective]:
    for line in bodies[name]:
        called = re.search(r"(?<= )(while|call|conditional|async-start)\(", line)
        if called:
            often = times * _trips(bodies, line) if called[1] == "while" else times
            for several, one in _CALLED.findall(line):
                for each in re.findall(r"[\w.\-]+", several or one):
                    yield from _inside(bodies, each, often)
            continue
        kind = _COLLECTIVE.search(line)
        if kind:
            yield _collective(line, kind, times)


_COLLECTIVE = re.compile(rf"= (?P<type>.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
_CALLED = re.compile(
    r"(?:body|to_apply|calls|branch_computations|true_computation|false_computation)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)


def _trips(bodies: dict[str, list[str]], line: str) -> int:
    """How often a loop's body runs: as the compiler found, or as its condition says before it has been compiled."""
    known = re.search(r'known_trip_count"?:\s*\{"n":"(\d+)"', line)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    assert condition, line
    bounds = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(bodies[condition[1]]))
    assert len(bounds) == 1, f"a loop that runs who knows how often: {line}"
    return int(bounds[0])


def _collective(line: str, found: re.Match[str], times: int) -> Collective:
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", found["type"])
    kind = found["kind"]
    if found["start"] and kind in ("all-gather", "collective-permute"):  # of (operands, results, ...)
        arrays = arrays[len(arrays) // 2 :] if kind == "all-gather" else arrays[1:2]
    shapes = tuple(tuple(map(int, filter(None, shape.split(",")))) for _, shape in arrays)
    size = sum(math.prod(s) * BITS[d] // 8 for s, (d, _) in zip(shapes, arrays, strict=True))
    members = _members(line)
    if kind == "reduce-scatter":
        size *= len(members)
    return Collective(kind, arrays[0][0], size, shapes, members, times)


def _members(line: str) -> tuple[int, ...]:
    """The first group of devices, in any of the forms that HLO writes groups in."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", line)
    if listed:
        return tuple(map(int, listed[1].split(",")))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\S+)", line)
    if iota:
        return tuple(_iota(iota[3]).reshape(int(iota[1]), int(iota[2]))[0].tolist())
    named = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))? \{(.*?)\}", line)
    assert named, f"groups of devices in an unknown form: {line}"
    mesh = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
    along = re.findall(r"'(\w+)'", named[3])
    places = _iota(named[2]) if named[2] else np.arange(math.prod(mesh.values()))
    group = places.reshape(tuple(mesh.values()))[tuple(slice(None) if name in along else 0 for name in mesh)]
    return tuple(group.flatten().tolist())


def _iota(text: str) -> np.ndarray:
    """0, 1, ... as HLO has them reordered: "[4,2]T(1,0)" is arange(8).reshape(4, 2).transpose(1, 0)."""
    found = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    assert found, text
    sizes = tuple(map(int, found[1].split(",")))
    order = tuple(map(int, found[2].split(","))) if found[2] else tuple(range(len(sizes)))
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(order)
