"""What the makers say of their accelerators: the one table of peaks, memories and bandwidths.

Bandwidths are of one device in one direction, bytes a second. An island is the devices that the fast links join: a host
of GPUs on NVLink, a pod of TPUs on ICI. Beyond it is the network, of which a device has its share of its host's cards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lm.config import InputError
from lm.fields import nearest


class Accelerator(NamedTuple):
    """kind: is in JAX's `device_kind`. flops: dense bfloat16, FLOP/s. memory: bytes. island: devices.

    link: bandwidth inside an island. network: between islands. source: the data sheets.
    """

    kind: str
    platform: str
    flops: float
    memory: float
    island: int
    link: float
    network: float
    source: str


GIB = 2**30
_INFINIBAND = "one network card a GPU"
_ICI = "ICI one way, over all ports"

# The first whose kind is contained in `device_kind` counts.
ACCELERATORS: Mapping[str, Accelerator] = {
    "b200": Accelerator(
        "B200", "gpu", 2250e12, 180e9, 8, 900e9, 50e9,
        f"NVIDIA HGX B200 and DGX B200 data sheets: NVLink 1.8 TB/s both ways, {_INFINIBAND} of 400 Gb/s",
    ),
    "h200": Accelerator(
        "H200", "gpu", 989e12, 141e9, 8, 450e9, 50e9,
        f"NVIDIA H200 and DGX H200 data sheets: NVLink 900 GB/s both ways, {_INFINIBAND} of 400 Gb/s",
    ),
    "h100": Accelerator(
        "H100", "gpu", 989e12, 80e9, 8, 450e9, 50e9,
        f"NVIDIA H100 (SXM5) and DGX H100 data sheets: NVLink 900 GB/s both ways, {_INFINIBAND} of 400 Gb/s",
    ),
    "a100": Accelerator(
        "A100", "gpu", 312e12, 80e9, 8, 300e9, 25e9,
        f"NVIDIA A100 80GB (SXM4) and DGX A100 data sheets: NVLink 600 GB/s both ways, {_INFINIBAND} of 200 Gb/s",
    ),
    "tpu-v6e": Accelerator(
        "TPU v6 lite", "tpu", 918e12, 32e9, 256, 400e9, 12.5e9,
        f"Google Cloud, TPU v6e: {_ICI}, half of 800 GB/s both ways; 4 x 200 Gb/s a host of 8",
    ),
    "tpu-v5e": Accelerator(
        "TPU v5 lite", "tpu", 197e12, 16e9, 256, 200e9, 3.125e9,
        f"Google Cloud, TPU v5e: {_ICI}, half of 400 GB/s both ways; 6.4 Tb/s a pod of 256",
    ),
    "tpu-v5p": Accelerator(
        "TPU v5", "tpu", 459e12, 95 * GIB, 8960, 600e9, 6.25e9,
        f"Google Cloud, TPU v5p: {_ICI}, half of 1200 GB/s both ways; 50 Gb/s a chip",
    ),
    "tpu-v4": Accelerator(
        "TPU v4", "tpu", 275e12, 32 * GIB, 4096, 300e9, 6.25e9,
        f"Google Cloud, TPU v4, and Jouppi et al. 2023, arXiv:2304.01433: {_ICI}, 6 links of 50 GB/s; the network is "
        "taken to be TPU v5p's",
    ),
}  # fmt: skip


def accelerator(name: str) -> Accelerator:
    """The one of that name. Raises InputError for another."""
    if name not in ACCELERATORS:
        raise InputError(f"no device {name!r}{nearest(name, ACCELERATORS)}: use one of {', '.join(ACCELERATORS)}")
    return ACCELERATORS[name]


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of a device in bfloat16, None where it is not known."""
    return next((each.flops for each in ACCELERATORS.values() if each.kind in device_kind), None)
