"""A plan past this machine: the real step, compiled ahead of time for a mesh of devices that aren't there.

XLA's CPU back end stands in for the accelerator's: it splits the program over the mesh as every back end does, so that
its collectives and the shapes on a device are the real ones. What it does otherwise is said beside the numbers. Times
are bounds from data sheets: no kernel reaches the peak, and no network all of its bandwidth.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from lm import plan as plans
from lm.config import InputError, ParallelConfig, RunConfig
from lm.costs.accelerators import Accelerator
from lm.costs.collectives import Collective, by_kind, collectives
from lm.fields import nearest
from lm.parallel import MESH_AXES, make_mesh
from lm.training.flops import flops_per_token, recomputed_flops_per_token
from lm.training.lowering import lower_step, optimizer_on


@dataclasses.dataclass(frozen=True)
class Exchanged:
    """The collectives of one kind and dtype along the same mesh axes, in a step. bytes: of the whole arrays; sent: by
    each device; seconds: for that, at the stated bandwidths."""

    kind: str
    dtype: str
    axes: str
    calls: int
    bytes: int
    sent: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Bytes are of one device; seconds and FLOPs of one step.

    planned: for the accelerator, without what only a CPU's compiler does; planned_for_cpu: with it, what XLA's
    `*_bytes` are to be compared with. compute_seconds: at the peak, what remat computes again included.
    """

    device: str
    devices: int
    planned: plans.Plan
    planned_for_cpu: plans.Plan
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    aliased_bytes: int
    compile_seconds: float
    exchanged: tuple[Exchanged, ...]
    asked: dict[str, int]  # bytes by kind and dtype, as the program asks for them; tensor's are the compiler's own
    widened_bytes: int  # of `exchanged`, what a CPU exchanges in float32 instead
    model_flops: float
    compute_seconds: float

    @property
    def compiled_bytes(self) -> int:
        """By XLA's memory analysis: arguments, results that don't take their places, temporaries."""
        return self.argument_bytes + self.output_bytes - self.aliased_bytes + self.temporary_bytes

    @property
    def exchange_seconds(self) -> float:
        return sum(each.seconds for each in self.exchanged)

    @property
    def seconds(self) -> tuple[float, float]:
        """Where exchange and compute overlap wholly, and where they don't at all."""
        return max(self.compute_seconds, self.exchange_seconds), self.compute_seconds + self.exchange_seconds

    def mfu(self, peak: float) -> tuple[float, float]:
        """Model FLOP utilisation at either of `seconds`."""
        low, high = (self.model_flops / (self.devices * peak * seconds) for seconds in reversed(self.seconds))
        return low, high

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields, and what follows from them."""
        found = dataclasses.asdict(self)
        return {
            **found,
            "planned": self.planned.as_dict(),
            "planned_for_cpu": self.planned_for_cpu.as_dict(),
            "compiled_bytes": self.compiled_bytes,
            "exchange_seconds": self.exchange_seconds,
            "seconds": self.seconds,
        }


def parsed_mesh(text: str) -> ParallelConfig:
    """The sizes in a text such as "data=8,fsdp=64"; one that isn't named is 1. Raises InputError for another text."""
    sizes: dict[str, int] = {}
    for piece in text.split(","):
        name, equals, size = piece.strip().partition("=")
        if not equals or not size.strip().isdecimal() or int(size) < 1:
            raise InputError(f"--mesh has {piece!r}: write AXIS=SIZE, as in data=8,fsdp=64")
        if name not in MESH_AXES:
            raise InputError(
                f"--mesh names {name!r}, but the mesh has no such axis{nearest(name, MESH_AXES)}: "
                f"its axes are {', '.join(MESH_AXES)}"
            )
        if name in sizes:
            raise InputError(f"--mesh names {name!r} twice: keep one")
        sizes[name] = int(size)
    return ParallelConfig(data=sizes.get("data", 1), fsdp=sizes.get("fsdp", 1), tensor=sizes.get("tensor", 1))


def forecast(cfg: RunConfig, devices: int, name: str, accelerator: Accelerator, island: int | None = None) -> Forecast:
    """Of a resolved and validated config.

    Args:
      island: devices that the fast links join. None: the accelerator's.
    """
    planned = plans.plan(cfg, devices, accelerator.platform)  # what doesn't fit together is refused by it
    for_cpu = plans.plan(cfg, devices, "cpu")
    mesh = make_mesh(cfg.parallel, fake_devices(devices))
    model = dataclasses.replace(cfg.model, attention="auto")  # a device's own kernel can't be compiled here
    cfg = dataclasses.replace(cfg, model=model)
    optimizer = optimizer_on(cfg, mesh)
    begin = time.perf_counter()
    lowered = lower_step(cfg, optimizer, mesh, plans.abstract_batch(cfg, mesh))
    options: Any = {"xla_backend_optimization_level": 0}  # LLVM's passes change nothing that is reported here
    compiled = lowered.compile(options)
    seconds = time.perf_counter() - begin
    asked, done = collectives(lowered.as_text("hlo")), collectives(compiled.as_text() or "")
    narrow = as_asked(done, asked)
    memory, context = compiled.memory_analysis(), cfg.data.context
    assert memory is not None
    tokens = cfg.training.batch_size * context
    lengths = context, cfg.data.source_length
    model_flops = flops_per_token(cfg.model, *lengths) * tokens
    again = recomputed_flops_per_token(cfg.model, *lengths) * tokens
    return Forecast(
        device=name,
        devices=mesh.size,
        planned=planned,
        planned_for_cpu=for_cpu,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        compile_seconds=seconds,
        exchanged=exchanged(narrow, mesh.shape, accelerator, island or accelerator.island),
        asked={f"{kind} {dtype}": size for (kind, dtype), size in by_kind(asked).items()},
        widened_bytes=sum(one.times * one.bytes for one, other in zip(narrow, done, strict=True) if one != other),
        model_flops=model_flops,
        compute_seconds=(model_flops + again) / (mesh.size * accelerator.flops),
    )


def as_asked(done: Iterable[Collective], asked: Iterable[Collective]) -> list[Collective]:
    """The compiled collectives, in bfloat16 where the program asks for that and XLA's CPU back end made it float32."""
    narrow = {(one.kind, one.shapes, one.members) for one in asked if one.dtype == "bf16"}

    def given(one: Collective) -> Collective:
        if one.dtype != "f32" or (one.kind, one.shapes, one.members) not in narrow:
            return one
        return one._replace(dtype="bf16", bytes=one.bytes // 2)

    return [given(one) for one in done]


def exchanged(
    found: Iterable[Collective], mesh: Mapping[str, int], accelerator: Accelerator, island: int
) -> tuple[Exchanged, ...]:
    """Collectives summed by kind, dtype and mesh axes, the longest first."""
    rows: dict[tuple[str, str, str], list[float]] = {}
    for one in found:
        row = rows.setdefault((one.kind, one.dtype, "+".join(one.axes(mesh)) or "none"), [0, 0, 0.0, 0.0])
        for at, more in enumerate((one.times, one.times * one.bytes, one.sent, seconds(one, accelerator, island))):
            row[at] += more
    made = [Exchanged(*key, int(row[0]), int(row[1]), row[2], row[3]) for key, row in rows.items()]
    return tuple(sorted(made, key=lambda each: -each.seconds))


def seconds(one: Collective, accelerator: Accelerator, island: int) -> float:
    """How long a collective takes by bandwidth alone, latency aside.

    Between islands a ring enters and leaves each once, through the network cards of all its members there at a time.
    """
    inside = one.sent / accelerator.link
    first = one.members[0] // island
    here = sum(member // island == first for member in one.members)
    return inside if here == one.group else max(inside, one.sent / (accelerator.network * here))


def fake_devices(count: int) -> list[jax.Device]:
    """So many CPU devices, of this process. Raises InputError where a back end runs already and has fewer."""
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # a back end runs
        pass
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise InputError(
            f"JAX has started with {len(devices)} devices, and {count} fake ones are needed: begin with them, in a "
            "process of their own"
        )
    return devices[:count]


def lines(found: Forecast, accelerator: Accelerator, island: int | None = None) -> list[str]:
    """A forecast to read, below the lines of its plan."""
    room, need, cpu = accelerator.memory, found.planned.total_bytes, found.planned_for_cpu.total_bytes
    difference = 100 * (cpu / found.compiled_bytes - 1)
    fits = (
        f"fits, {100 * (1 - need / room):.0f} % free" if need <= room else f"does NOT fit, {need / room:.1f} times it"
    )
    low, high = found.mfu(accelerator.flops)
    fast, slow = found.seconds
    tokens = found.planned.batch_tokens
    return [
        f"compiled   for {found.devices} fake CPU devices in {found.compile_seconds:.1f} s, nothing allocated",
        f"xla        {_mb(found.compiled_bytes)} MB a device by its memory analysis: {_mb(found.argument_bytes)} "
        f"arguments, {_mb(found.temporary_bytes)} temporaries,",
        f"           {_mb(found.output_bytes)} results, {_mb(found.aliased_bytes)} of them in arguments' places",
        f"           {_mb(cpu)} MB by the plan for XLA's CPU back end ({difference:+.1f} %)",
        f"{found.device:<10} {_mb(need)} MB of {_mb(room)} by the plan above: {fits}",
        *_exchange_lines(found),
        f"time       {found.compute_seconds:,.3f} s a step to compute at {accelerator.flops / 1e12:,.0f} TFLOP/s a "
        f"device, {found.exchange_seconds:,.3f} s to exchange",
        f"           {fast:,.3f} s where they overlap: MFU {100 * high:.1f} %, {tokens / fast:,.0f} tokens/s",
        f"           {slow:,.3f} s where they don't:   MFU {100 * low:.1f} %, {tokens / slow:,.0f} tokens/s",
        f"from       {accelerator.link / 1e9:,.0f} GB/s a device within {island or accelerator.island} devices, "
        f"{accelerator.network / 1e9:,.1f} GB/s beyond",
        f"           ({accelerator.source})",
    ]


def _exchange_lines(found: Forecast) -> list[str]:
    rows = [
        f"{'exchange' if at == 0 else '':11}{each.kind} of {each.dtype} over {each.axes}: {_mb(each.bytes)} MB in "
        f"{each.calls:,} calls, {_mb(each.sent)} MB sent by each device, {each.seconds:.3f} s"
        for at, each in enumerate(found.exchanged)
    ]
    done: dict[str, int] = {}
    for each in found.exchanged:
        done[f"{each.kind} {each.dtype}"] = done.get(f"{each.kind} {each.dtype}", 0) + each.bytes
    changed = []
    if found.widened_bytes:
        changed.append(
            f"           {_mb(found.widened_bytes)} MB in bf16 as the program asks for it; XLA's CPU back end itself "
            "makes it f32"
        )
    changed += [
        f"           {name}: the program asks for {_mb(found.asked.get(name, 0))} MB, the compiler makes of it "
        f"{_mb(done.get(name, 0))} MB"
        for name in sorted({*done, *found.asked})
        if abs(found.asked.get(name, 0) - done.get(name, 0)) > 0.01 * sum(done.values())
    ]
    return (rows or ["exchange   none"]) + changed


def _mb(size: float) -> str:
    return f"{size / 1e6:,.1f}"
