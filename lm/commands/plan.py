"""python -m lm plan: what a run would take."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from lm import cli, output
from lm.config import InputError


@dataclasses.dataclass(frozen=True)
class PlanArguments(cli.PresetArguments):
    """Says what a run would take, before anything runs: parameters, FLOPs a token, bytes a device. PRESET and fields as
    for train.py. No text is read: a BPE that is to be trained is taken to have tokenizer.vocab_size tokens. With
    --device, the step is compiled ahead of time for as many fake devices: what XLA finds it to take, what the devices
    exchange, and what that takes at least by the device's data sheet."""

    devices: int | None = None
    """Devices to share the run out over; they needn't be there. None: as many as the parallel section names."""
    mesh: str | None = None
    """Sizes of the mesh axes in place of the parallel section's and --devices, as in data=8,fsdp=64."""
    device: str | None = None
    """The accelerator to plan for: h100, h200, b200, a100, tpu-v4, tpu-v5e, tpu-v5p or tpu-v6e. None: nothing is
    compiled."""
    devices_per_host: int | None = None
    """Devices that fast links join, NVLink or ICI. None: those of the device: 8 GPUs of a host, a pod of TPUs."""
    json: str | None = None
    """Also write the figures to this file."""


def plan(argv: Sequence[str]) -> None:
    """Prints the table."""
    from lm import api

    name, arguments = cli.with_preset(PlanArguments, argv, api.preset, prog="python -m lm plan")
    target = None if arguments.json is None else output.writable_file("--json", arguments.json)
    from lm import forecast
    from lm import plan as plans
    from lm.costs import accelerators

    device = None if arguments.device is None else accelerators.accelerator(arguments.device)
    island = arguments.devices_per_host
    if island is not None and (device is None or island < 1):
        raise InputError(f"--devices-per-host is {island}: use 1 or more, with --device")
    if arguments.devices is not None and arguments.devices < 1:
        raise InputError(f"--devices is {arguments.devices}: use 1 or more")
    config = arguments.config
    if arguments.mesh is not None:
        if arguments.devices is not None:
            raise InputError(f"--mesh {arguments.mesh} says how many devices there are: leave --devices out")
        sizes = forecast.parsed_mesh(arguments.mesh)
        parallel = dataclasses.replace(config.parallel, data=sizes.data, fsdp=sizes.fsdp, tensor=sizes.tensor)
        config = dataclasses.replace(config, parallel=parallel)
    parallel = config.parallel
    named = (parallel.data or 1) * parallel.fsdp * parallel.tensor
    devices = named if arguments.devices is None else arguments.devices
    if device is not None and devices > 0:
        forecast.fake_devices(devices)  # before a model that it goes on from is opened on a real one
    config = plans.resolved(config, api.load)
    if device is None:
        found = plans.plan(config, devices)
        lines, figures = plans.lines(name, found), found.as_dict()
    else:
        future = forecast.forecast(config, devices, str(arguments.device), device, island)
        lines = plans.lines(name, future.planned) + forecast.lines(future, device, island)
        figures = {**future.planned.as_dict(), "forecast": future.as_dict()}
    if target is not None:
        with output.whole_file(target) as file:
            file.write(json.dumps({"preset": name, **figures}, indent=2) + "\n")
    for line in lines:
        print(line)
