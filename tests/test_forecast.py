"""Plans past this machine: devices of data sheets, collectives in time, and the command in a process of its own."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from lm.config import ParallelConfig
from lm.costs.accelerators import ACCELERATORS, peak_flops
from lm.costs.collectives import Collective
from lm.forecast import as_asked, exchanged, parsed_mesh, seconds


def gather(members: tuple[int, ...], size: int = 10**9, times: int = 1) -> Collective:
    return Collective("all-gather", "bf16", size, ((size // 2,),), members, times)


def test_a_device_is_known_by_its_kind():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU v5p") == 459e12
    assert peak_flops("TPU v6 lite") == 918e12
    assert peak_flops("cpu") is None


def test_meshes_are_read():
    assert parsed_mesh("data=8,fsdp=64") == ParallelConfig(data=8, fsdp=64)
    assert parsed_mesh("tensor=2") == ParallelConfig(data=1, tensor=2)


def test_collectives_take_the_links_of_a_host_and_the_cards_between_hosts():
    h100 = ACCELERATORS["h100"]
    assert seconds(gather(tuple(range(8))), h100, 8) == pytest.approx(1e9 * 7 / 8 / 450e9)
    across = tuple(range(16))  # two hosts, eight cards each
    assert seconds(gather(across), h100, 8) == pytest.approx(1e9 * 15 / 16 / (8 * 50e9))
    alone = tuple(range(0, 64, 8))  # one device of each of eight hosts
    assert seconds(gather(alone), h100, 8) == pytest.approx(1e9 * 7 / 8 / 50e9)
    assert seconds(gather(alone), h100, 64) == pytest.approx(1e9 * 7 / 8 / 450e9)


def test_what_a_cpu_widens_counts_as_it_is_asked_for():
    asked, others = gather((0, 1)), gather((0, 2))
    wide = [one._replace(dtype="f32", bytes=2 * one.bytes) for one in (asked, others)]
    assert as_asked(wide, [asked]) == [asked, wide[1]]


def test_collectives_are_summed_by_kind_and_axis():
    mesh = {"data": 2, "fsdp": 4, "tensor": 1}
    all_of = [gather((0, 1, 2, 3), times=3), gather((0, 1, 2, 3)), gather((0, 4))]
    found = exchanged(all_of, mesh, ACCELERATORS["h100"], 8)
    assert [(each.axes, each.calls, each.bytes) for each in found] == [("fsdp", 4, 4 * 10**9), ("data", 1, 10**9)]
    assert found[0].sent == pytest.approx(4 * 10**9 * 3 / 4)


def test_the_command_compiles_for_more_devices_than_there_are(tmp_path):
    """16 devices, in a process of its own: a layer is gathered twice, in the compute dtype."""
    command = "-m lm plan tiny --mesh fsdp=16 --device h100 --training.batch-size 16 --model.compute-dtype bfloat16 "
    command += "--model.scan-layers True --model.remat True"
    path = tmp_path / "plan.json"
    done = subprocess.run(
        [sys.executable, *command.split(), "--json", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "does NOT fit" not in done.stdout and "MFU" in done.stdout and "DGX H100" in done.stdout
    plan = json.loads(path.read_text())
    forecast = plan["forecast"]
    assert forecast["devices"] == 16 and forecast["compute_seconds"] > 0
    assert forecast["planned_for_cpu"]["total_bytes"] == pytest.approx(forecast["compiled_bytes"], rel=0.15)
    gathers = sum(each["bytes"] for each in forecast["exchanged"] if each["kind"] == "all-gather")
    assert {each["dtype"] for each in forecast["exchanged"] if each["kind"] == "all-gather"} == {"bf16"}
    # The layers twice; the table, tied to the head and looked up in its own dtype, once.
    layers, table = plan["layers"] * plan["layer_parameters"], plan["embedding_parameters"]
    assert 2 * layers < gathers / 2 < 2 * layers + 2.1 * table
    assert math.prod(forecast["planned"]["mesh"].values()) == 16
