"""A traced program as one list of operations on buffers: calls written out, loops and branches as one operation each.

It holds what a compiler does before it plans memory: what is computed twice from the same is computed once, and a value
that was only rounded and widened again is the one before, wherever the back end allows itself that.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Primitives that XLA computes inside of whatever reads them, again for each reader.
CHEAP = _names(
    "abs add add_any and broadcast_in_dim ceil clamp convert_element_type copy_p dynamic_slice eq floor gather ge gt "
    "integer_pow iota is_finite le lt max min mul ne neg not or pad real reduce_precision rem rev round select_n "
    "shift_left shift_right_arithmetic shift_right_logical sign slice split square sub transpose xor"
)
# The same, but too dear to be computed twice: stored where there are several readers.
DEAR = _names(
    "atan2 cbrt concatenate cos cumsum div erf erf_inv erfc exp exp2 expm1 log log1p logistic pow random_bits "
    "random_fold_in random_unwrap random_wrap rsqrt sin sqrt tan tanh threefry2x32"
)
REDUCTIONS = _names("argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum")
FUSED = CHEAP | DEAR | REDUCTIONS
# The same bytes under another name or shape.
_RENAMED = _names(
    "bitcast_convert_type copy expand_dims optimization_barrier pcast pvary reshape reshard sharding_constraint "
    "squeeze stop_gradient"
)
_EXCHANGES = _names("all_gather all_gather_invariant all_to_all psum psum_invariant psum_scatter reduce_scatter")
_WRITTEN_OVER = _names("cond dynamic_update_slice scan scatter scatter-add while")
IN_PLACE = (CHEAP | DEAR | _WRITTEN_OVER) - {"transpose"}
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
_CUSTOM = {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "custom_vjp_call_jaxpr": "fun_jaxpr"}
_REMAT = frozenset(("checkpoint", "remat", "remat2"))


@dataclasses.dataclass(eq=False)
class Buffer:
    size: int  # bytes on a device
    shape: tuple[int, ...]
    dtype: Any = None
    made_by: Operation | None = None
    same_as: Buffer | None = None  # of a renamed one
    parts: int = 1  # devices that the shape is split over
    of_batch: bool = False
    narrow: Buffer | None = None  # the bfloat16 array that this one was widened from
    constant: str | None = None  # written into the program
    uniform: bool = False  # a constant, or one number over and over, which is computed as one
    role: str = ""  # in a loop's body: "carry" or "slice"
    fused: bool = False  # never stored
    readers: list[Operation] = dataclasses.field(default_factory=list)

    @property
    def root(self) -> Buffer:
        return self if self.same_as is None else self.same_as.root


@dataclasses.dataclass(eq=False)
class Operation:
    name: str
    inputs: list[Buffer]
    outputs: list[Buffer]
    inside: Counter  # what a loop's or branch's body holds besides
    index: int
    widened: int = 0  # bytes of float32 copies of bfloat16 stacks, while a loop runs
    narrowed: int = 0  # bytes of those stacks


class Trace:
    """A program as a list of operations, calls written out."""

    def __init__(self, platform: str, fullest: Callable[[Trace, Sequence[Buffer]], Counter]):
        """`fullest` says what the body of a loop or branch holds at most, by the trace of it and its results."""
        self.platform, self.fullest = platform, fullest
        self.operations: list[Operation] = []
        self.known: dict[Any, list[Buffer]] = {}
        self.scope = 0  # what is rematerialised is not taken from outside

    def closed(self, program: Any, arguments: Sequence[Buffer]) -> list[Buffer]:
        constants = [Buffer(size_of(c), c.shape, c.dtype) for c in map(jax.typeof, program.consts)]
        return self.run(program.jaxpr, [*constants, *arguments])

    def run(self, jaxpr: Any, arguments: Sequence[Buffer]) -> list[Buffer]:
        found = dict(zip([*jaxpr.constvars, *jaxpr.invars], arguments, strict=True))

        def read(one: Any) -> Buffer:
            return (
                Buffer(0, (), one.aval.dtype, constant=str(one.val), uniform=not one.aval.shape)
                if hasattr(one, "val")
                else found[one]
            )

        for equation in jaxpr.eqns:
            results = self.equation(equation, [read(one) for one in equation.invars])
            found.update(zip(equation.outvars, results, strict=True))
        return [read(one) for one in jaxpr.outvars]

    def equation(self, equation: Any, inputs: list[Buffer]) -> list[Buffer]:
        name, given = equation.primitive.name, equation.params
        if name in _CALLS or name in _CUSTOM:
            return self.closed(given[{**_CALLS, **_CUSTOM}[name]], inputs)
        if name in _REMAT:
            # A CPU's compiler takes the barriers away before it looks for what is computed twice.
            outer, self.scope = self.scope, 0 if self.platform == "cpu" else len(self.operations) + 1
            results = self.run(given["jaxpr"], inputs)
            self.scope = outer
            return results
        if name == "shard_map":
            return self.sharded(equation, inputs)
        if name == "platform_index":
            return [Buffer(0, (), constant=f"platform {self.platform_index(given['platforms'])}")]
        if name == "cond":
            chosen = inputs[0].constant
            if chosen is not None and chosen.startswith("platform"):
                return self.closed(given["branches"][int(chosen.split()[1])], inputs[1:])
            inside = max((self.inside(branch) for branch in given["branches"]), key=Counter.total)
            return self.add(equation, inputs, inside=inside)
        if name == "scan":
            # What is sliced or stacked has an axis more outside; JAX names the numbers otherwise from one to the next.
            body = given["jaxpr"]
            carried = sum(map(_as_large, equation.outvars, body.jaxpr.outvars))
            whole = sum(map(_as_large, equation.invars, body.jaxpr.invars))
            return self.loop(equation, inputs, body, whole - carried, carried)
        if name == "while":
            body = given["body_jaxpr"]
            kept = inputs[given["cond_nconsts"] :]
            return self.loop(equation, kept, body, given["body_nconsts"], len(kept) - given["body_nconsts"])
        if name in _RENAMED:
            return [self.renamed(one, variable.aval) for one, variable in zip(inputs, equation.outvars, strict=True)]
        if name == "convert_element_type":
            return [self.converted(equation, inputs[0])]
        return self.add(equation, inputs)

    def platform_index(self, platforms: Sequence[Any]) -> int:
        return next(at for at, names in enumerate(platforms) if not names or self.platform in names)

    def renamed(self, one: Buffer, aval: Any) -> Buffer:
        if one.constant is not None:
            return one
        narrow = None if one.narrow is None else dataclasses.replace(one.narrow, shape=aval.shape, same_as=one.narrow)
        return dataclasses.replace(one, shape=aval.shape, same_as=one, narrow=narrow, readers=[])

    def converted(self, equation: Any, one: Buffer) -> Buffer:
        """bfloat16 made float32 and bfloat16 again is the first."""
        before, after = equation.invars[0].aval.dtype, equation.outvars[0].aval.dtype
        if (before, after) == ("float32", "bfloat16") and one.narrow is not None:
            return one.narrow
        (result,) = self.add(equation, [one])
        if (before, after) == ("bfloat16", "float32"):
            result.narrow = one
        return result

    def sharded(self, equation: Any, inputs: list[Buffer]) -> list[Buffer]:
        """Inside of a shard_map shapes are those of a device."""
        given, mesh = equation.params, equation.params["mesh"].shape

        def renamed(one: Buffer, aval: Any, parts: int) -> Buffer:
            return dataclasses.replace(one, shape=aval.shape, same_as=one, parts=parts, readers=[])

        def split(spec: Any) -> int:
            names = [name for entry in spec for name in ((entry,) if isinstance(entry, str) else entry or ())]
            return math.prod(mesh[name] for name in names)

        local = [renamed(one, inner.aval, 1) for one, inner in zip(inputs, given["jaxpr"].invars, strict=True)]
        found = zip(self.run(given["jaxpr"], local), equation.outvars, given["out_specs"], strict=True)
        return [renamed(one, outer.aval, split(spec)) for one, outer, spec in found]

    def loop(self, equation: Any, inputs: list[Buffer], body: Any, constants: int, carried: int) -> list[Buffer]:
        """What a scan carries stays in place; it holds its body's buffers once, whatever its length."""
        sub = Trace(self.platform, self.fullest)
        roles = [""] * constants + ["carry"] * carried + ["slice"] * (len(inputs) - constants - carried)
        outer = equation.invars[len(equation.invars) - len(inputs) :]
        inputs = [self.begun(one) if role == "carry" else one for one, role in zip(inputs, roles, strict=True)]
        arguments = [
            Buffer(
                size_of(variable.aval),
                variable.aval.shape,
                one.dtype,
                of_batch=one.of_batch,
                role=role,
            )
            for variable, one, role in zip(body.jaxpr.invars, inputs, roles, strict=True)
        ]
        inside = self.fullest(sub, sub.closed(body, arguments))
        results = self.add(equation, inputs, inside=inside)
        operation = results[0].made_by
        assert operation is not None
        for argument, one, variable in zip(arguments, inputs, outer, strict=True):
            # Element-wise readers of a bfloat16 stack: on a CPU its conversion is taken out of the loop.
            read = any(reader.name in FUSED for reader in argument.readers)
            if self.platform == "cpu" and argument.role == "slice" and read and variable.aval.dtype == "bfloat16":
                operation.widened += 2 * one.size
                operation.narrowed += one.size
        return results

    def begun(self, one: Buffer) -> Buffer:
        """A loop writes over the array that it begins from: each has zeros of its own."""
        made = one.root.made_by
        if made is None or not one.root.uniform:
            return one
        aval = jax.ShapeDtypeStruct(one.shape, one.dtype)
        (fresh,) = self.operation(made.name, made.inputs, [aval], None, Counter())
        fresh.size, fresh.parts = one.size, one.parts
        return fresh

    def inside(self, branch: Any) -> Counter:
        sub = Trace(self.platform, self.fullest)
        arguments = [Buffer(size_of(v.aval), v.aval.shape, v.aval.dtype, of_batch=True) for v in branch.jaxpr.invars]
        return self.fullest(sub, sub.closed(branch, arguments))

    def add(self, equation: Any, inputs: list[Buffer], *, inside: Counter | None = None) -> list[Buffer]:
        name, avals = equation.primitive.name, [variable.aval for variable in equation.outvars]
        if name in CHEAP | DEAR and len(inputs) > 1:
            inputs = [self.broadcast(one, avals[0]) for one in inputs]
        key = (name, str(equation.params), tuple(map(str, avals))) if name in FUSED | _EXCHANGES else None
        if self.platform == "cpu" and name in _EXCHANGES and avals[0].dtype == "bfloat16":  # done in float32 there
            wide = [jax.ShapeDtypeStruct(aval.shape, "float32") for aval in avals]
            whole = self.operation(name, inputs, wide, key, Counter())
            return [
                self.operation("convert_element_type", [one], [aval], ("narrow",), Counter())[0]
                for one, aval in zip(whole, avals, strict=True)
            ]
        return self.operation(name, inputs, avals, key, inside or Counter())

    def broadcast(self, one: Buffer, aval: Any) -> Buffer:
        """An operand with ones where the result has more: XLA makes it as large in an operation of its own."""
        if len(one.shape) != len(aval.shape) or not one.shape or math.prod(one.shape) >= math.prod(aval.shape):
            return one
        whole = jax.ShapeDtypeStruct(aval.shape, one.dtype)
        return self.operation("broadcast_in_dim", [one], [whole], ("broadcast_in_dim", str(aval.shape)), Counter())[0]

    def operation(
        self, name: str, inputs: list[Buffer], avals: list[Any], key: tuple | None, inside: Counter
    ) -> list[Buffer]:
        """A new operation's results, or those of the same one before."""
        if name in CHEAP | DEAR and inputs and all(one.uniform for one in inputs):
            name, key, inputs = "broadcast_in_dim", ("uniform", key, tuple(map(str, avals))), []
        operands = tuple(one.constant if one.constant is not None else (id(one.root), one.shape) for one in inputs)
        known = (self.scope, key, operands)
        if key is not None and known in self.known:
            return self.known[known]
        made = Operation(name, inputs, [], inside, len(self.operations))
        of_batch = any(one.of_batch for one in inputs)
        for aval in avals:
            split = max((one.parts for one in inputs if one.shape == aval.shape), default=1)
            size, dtype = size_of(aval) // split, getattr(aval, "dtype", None)
            uniform = name == "broadcast_in_dim" and all(one.uniform for one in inputs)
            made.outputs.append(Buffer(size, aval.shape, dtype, made, parts=split, of_batch=of_batch, uniform=uniform))
        self.operations.append(made)
        if key is not None:
            self.known[known] = made.outputs
        return made.outputs


def _as_large(outside: Any, inside: Any) -> bool:
    return len(outside.aval.shape) == len(inside.aval.shape)


def size_of(aval: Any) -> int:
    """Bytes of a whole array; PRNG keys are two words."""
    itemsize = getattr(aval.dtype, "itemsize", None) if hasattr(aval, "dtype") else 0
    return math.prod(getattr(aval, "shape", ())) * (8 if itemsize is None else itemsize)
