"""How many bytes a traced program holds at its fullest moment, by following its arrays from where they are made to
where they are read last.

It goes by what a compiler does that decides about memory: element-wise operations are fused into those that read them,
and nothing between them is stored; loops run in place; donated arguments are overwritten. What only XLA's CPU back end
does is marked. The order is that of the trace, and a buffer is free after its last reader. Nothing here was fitted:
each rule has its cause beside it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp

from lm.costs.operations import CHEAP, DEAR, FUSED, IN_PLACE, REDUCTIONS, Buffer, Operation, Trace, size_of

_SMALL = 64
"""Bytes of a scalar or so, which are written into the program."""
_READERS = 8
"""More than these, and nothing is computed again for each."""


@dataclasses.dataclass(frozen=True)
class Peak:
    """Bytes of a device at the fullest moment, arguments apart.

    weights and gradients: of the shape of a parameter, a layer's or a stack's, whole or a part; weights are made of the
    state alone, such as operands in the compute dtype and gathered layers. activations: all else. copies: made by the
    CPU back end alone of donated arguments.
    """

    weights: int = 0
    gradients: int = 0
    activations: int = 0
    copies: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.activations + self.copies


def peak(
    program: Any, parts: Sequence[int], *, state: int, platform: str, parameters: Iterable[tuple[int, ...]]
) -> Peak:
    """The fullest moment of a closed jaxpr.

    Args:
      program: a step `(state, batch, …) -> (state, …)`, the state donated.
      parts: of how many devices' parts each argument is made.
      state: how many arguments, and results, are the state.
      platform: "cpu", "gpu" or "tpu".
      parameters: the shapes that a gradient can have.
    """
    shapes = frozenset(map(_plain, parameters))

    def of_body(trace: Trace, results: Sequence[Buffer]) -> Counter:
        return _Moments(trace, results, (), shapes).fullest()

    trace = Trace(platform, of_body)
    arguments = [
        Buffer(size_of(aval) // split, aval.shape, aval.dtype, parts=split, of_batch=index >= state)
        for index, (aval, split) in enumerate(zip(program.in_avals, parts, strict=True))
    ]
    results = trace.closed(program, arguments)
    donated = list(zip(arguments[:state], results[:state], strict=True))
    moment = _Moments(trace, results, donated, shapes).fullest()
    return Peak(moment["weights"], moment["gradients"], moment["activations"], moment["copies"])


class _Moments:
    """The stored buffers of a trace in time."""

    def __init__(
        self,
        trace: Trace,
        results: Sequence[Buffer],
        donated: Sequence[tuple[Buffer, Buffer]],
        parameters: frozenset[tuple[int, ...]],
    ):
        self.trace, self.parameters, self.results = trace, parameters, {one.root for one in results}
        for operation in trace.operations:
            for root in {one.root for one in operation.inputs}:
                root.readers.append(operation)
        self.library: set[Operation] = set()
        self._fuse()
        self.reads = {
            operation: {real for one in operation.inputs for real in self._stored(one.root)}
            for operation in trace.operations
            if not all(one.fused for one in operation.outputs)
        }
        self.last = {one: operation.index for operation, read in self.reads.items() for one in read}
        self.last |= {real: len(trace.operations) for one in self.results for real in self._stored(one)}
        self.given = {after.root: before.root for before, after in donated}
        self.free: Counter = Counter()  # sizes of donated arguments that were copied
        if trace.platform == "cpu":
            self._copy_donated()

    def _fuse(self) -> None:
        """Decides what is never stored, from the last operation to the first: what nobody reads is not even made."""
        ends: dict[Operation, set[Operation]] = {}  # those that an operation is computed in
        for operation in reversed(self.trace.operations):
            readers = {reader for one in operation.outputs for reader in one.readers if reader in ends}
            result = any(one in self.results for one in operation.outputs)
            stored_in = {end for reader in readers for end in ends[reader]}
            fused = not result and (not readers or self._fits(operation, readers, stored_in))
            for one in operation.outputs:
                one.fused = fused
            if readers or result:
                ends[operation] = stored_in if fused else {operation}

    def _fits(self, operation: Operation, readers: set[Operation], ends: set[Operation]) -> bool:
        if operation.name == "iota":
            return True
        if operation.name == "broadcast_in_dim" and all(one.size <= _SMALL for one in operation.inputs):
            return not any(reader.name in ("scan", "while") for reader in readers)  # a loop begins from an array
        if operation.name not in CHEAP | DEAR or not all(reader.name in FUSED for reader in readers):
            return False
        if len(ends) == 1:
            return True
        if operation.name in DEAR or len(ends) > _READERS:
            return False
        if self.trace.platform != "cpu":
            return True
        # There sums and what is around them are a library's, which reads whole arrays; and rounding is dear.
        if any(end.name in REDUCTIONS or end in self.library for end in ends):
            self.library.add(operation)
            return False
        return operation.outputs[0].dtype != jnp.bfloat16

    @functools.cache  # noqa: B019  (as long-lived as the moments)
    def _stored(self, one: Buffer) -> frozenset[Buffer]:
        """The buffers that are read where this one is."""
        if not one.fused:
            return frozenset(() if one.constant is not None else (one,))
        assert one.made_by is not None
        return frozenset(real for each in one.made_by.inputs for real in self._stored(each.root))

    def _copy_donated(self) -> None:
        """XLA copies a donated argument that is read by others than its result, unless those come before the result for
        sure, such as the moments of Optax's own Adam, which the new weights are computed from once more. The copy is
        made at the start; the argument's own place then serves for arrays of its size. On GPUs one kernel makes all."""
        for result, argument in self.given.items():
            writer = result.made_by
            others = {op for op, read in self.reads.items() if argument in read and op is not writer}
            if writer is not None and others and not others <= self._before(writer):
                self.free[argument.size] += 1

    def _before(self, operation: Operation) -> set[Operation]:
        """The operations that it depends on."""
        found: set[Operation] = set()
        waiting = [operation]
        while waiting:
            for one in self.reads[waiting.pop()]:
                if one.made_by is not None and one.made_by not in found:
                    found.add(one.made_by)
                    waiting.append(one.made_by)
        return found

    def _kind(self, one: Buffer) -> str:
        if _plain(one.shape) not in self.parameters:
            return "activations"
        return "gradients" if one.of_batch or one.uniform else "weights"

    def fullest(self) -> Counter:
        """Bytes at the fullest moment by kind. Carried arguments of a loop are its caller's."""
        held: dict[Buffer, int] = {}
        carried = {one: one.size for read in self.reads.values() for one in read if one.role == "carry"}
        spare, copies = self.free.copy(), sum(size * number for size, number in self.free.items())
        held |= carried | {one: self._cost(one, spare) for one in self._early()}
        most = sum(held.values())
        best: Counter = Counter()
        for operation, read in self.reads.items():
            ending = [one for one in read if one in held and self.last[one] == operation.index]
            new = {one: self._cost(one, spare) for one in operation.outputs if not one.fused and one not in held}
            room = [held[one] for one in ending] if operation.name in IN_PLACE else []
            grown = 0
            for size in new.values():
                if size in room:
                    room.remove(size)
                else:
                    grown += size
            narrowed = min(operation.narrowed, sum(held[one] for one in ending))
            now = sum(held.values()) + grown + operation.inside.total() + operation.widened - narrowed
            if now > most:
                most, best = now, self._by_kind(held, operation, new, now)
            for one in ending:
                if held.pop(one) == 0 and one not in self.given:
                    spare[one.size] += 1
            held |= {one: size for one, size in new.items() if one in self.last}
        best["activations"] -= sum(carried.values())
        best["copies"] = copies
        return best

    def _early(self) -> set[Buffer]:
        """What is there from the beginning on a CPU, whose schedule makes at once what waits for nothing of the batch:
        the zeros that loops begin from, weights as operands, gathered ones."""
        if self.trace.platform != "cpu":
            return set()
        made = (one for operation in self.reads for one in operation.outputs if not one.fused and not one.of_batch)
        return {one for one in made if one in self.last and one not in self.given}

    def _cost(self, one: Buffer, spare: Counter) -> int:
        """Bytes that storing a buffer takes: none for the new state, which takes the place of the old."""
        if one in self.given:
            return 0
        if spare[one.size]:
            spare[one.size] -= 1
            return 0
        return one.size

    def _by_kind(self, held: dict[Buffer, int], operation: Operation, new: dict[Buffer, int], total: int) -> Counter:
        kinds = Counter(operation.inside)
        for one, size in {**held, **new}.items():
            kinds[self._kind(one)] += size
        kinds["activations"] += total - kinds.total()  # what is taken over in place counts once
        return kinds


def _plain(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape but for order and ones: a gradient may be made turned."""
    return tuple(sorted(size for size in shape if size > 1))
