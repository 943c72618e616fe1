"""When the allocator is told to keep what is freed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lm import allocator

PROGRAM = """
import ctypes, resource
from lm import allocator
allocator.keep_freed_memory()
print(allocator.note())
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def touch():
    block = libc.malloc(2**26)
    ctypes.memset(block, 1, 2**26)
    libc.free(block)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    touch()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
touch()
print(faults())
allocator.give_back()
print(faults())
"""


@pytest.mark.skipif(not (sys.platform == "linux" and allocator._is_glibc()), reason="glibc's malloc alone is told")
def test_a_block_freed_is_used_again_without_page_faults_unless_given_back():
    def faults(**environment):
        environment = {"PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu", **environment}
        command = [sys.executable, "-c", PROGRAM]
        said, *counts = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True, cwd=Path.cwd()
        ).stdout.splitlines()
        return said, *map(int, counts)

    said, kept, given_back = faults()
    assert said.startswith("allocator") and kept < 100 and given_back > 1000
    said, count, _ = faults(LM_ALLOCATOR="system")
    assert said == "None" and count > 1000


INLINE = """
from lm import allocator
allocator.keep_freed_memory()
allocator.compute_inline()
import jax
print(jax.jit(lambda x: x @ x @ x @ x)(jax.numpy.ones((2000, 2000))).is_ready())
"""


@pytest.mark.skipif(not (sys.platform == "linux" and allocator._is_glibc()), reason="glibc's malloc alone is told")
def test_the_thread_that_asks_for_a_computation_does_it():
    """When the call returns, the result is there."""

    def done(**environment):
        environment = {"PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu", **environment}
        command = [sys.executable, "-c", INLINE]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True, cwd=Path.cwd()
        ).stdout.split()

    assert done() == ["True"]
    for other in ({"LM_ALLOCATOR": "system"}, {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}):
        assert done(**other) == ["False"]


def test_who_has_chosen_an_allocator_keeps_it():
    assert allocator._undecided({"GLIBC_TUNABLES": "glibc.cpu.x86_shstk=off"})
    for name, value in (
        ("LM_ALLOCATOR", "system"),
        ("MALLOC_ARENA_MAX", "2"),
        ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),
        ("LD_PRELOAD", "/usr/lib/libjemalloc.so.2"),
    ):
        assert not allocator._undecided({name: value})


def test_several_devices_of_a_cpu_are_known_by_what_jax_is_told():
    assert allocator._one_device({}) and allocator._one_device({"XLA_FLAGS": "--xla_cpu_enable_fast_math=false"})
    assert allocator._one_device({"JAX_NUM_CPU_DEVICES": "1"})
    assert not allocator._one_device({"JAX_NUM_CPU_DEVICES": "4"})
    assert not allocator._one_device({"XLA_FLAGS": "--xla_force_host_platform_device_count=8"})


def test_only_where_jax_computes_on_the_cpu():
    assert allocator._on_cpu({"JAX_PLATFORMS": "cpu"})
    assert not allocator._on_cpu({"JAX_PLATFORMS": "cuda,cpu"})
