"""When the allocator is told to keep what is freed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lm import allocator

PROGRAM = """
import ctypes, os, resource
from lm import allocator
if {limited}:
    resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))
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
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
print(faults(), faults(), resident())
allocator.give_back()
print(resident(), faults(), faults())
"""
GLIBC = pytest.mark.skipif(
    not (sys.platform == "linux" and allocator._is_glibc()), reason="glibc's malloc alone is told"
)


def said_and_counted(*, limited=False, **environment):
    environment = {"PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu", **environment}
    command = [sys.executable, "-c", PROGRAM.format(limited=limited)]
    said, before, after = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, cwd=Path.cwd()
    ).stdout.splitlines()
    return said, [int(count) for count in before.split()], [int(count) for count in after.split()]


@GLIBC
@pytest.mark.parametrize("limited", [False, True])
def test_a_block_freed_is_used_again_without_page_faults_unless_given_back(limited):
    said, (_, again, held), (resident, _, later) = said_and_counted(limited=limited)
    assert said.startswith("allocator") and again < 100 and later < 100
    assert resident < held - 0.9 * 2**26


@GLIBC
def test_a_user_can_leave_it_as_it_was():
    said, (first, again, _), _ = said_and_counted(LM_ALLOCATOR="system")
    assert said == "None" and first > 1000 and again > 1000


HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@GLIBC
@pytest.mark.skipif(not HUGE.is_file() or "[madvise]" not in HUGE.read_text(), reason="the kernel gives all or none")
def test_it_is_in_huge_pages_before_and_after_it_was_given_back():
    said, (first, *_), (_, after, _) = said_and_counted()
    assert "huge pages" in said and first < 1000 and after < 1000


@GLIBC
def test_no_addresses_are_taken_where_they_are_counted():
    said, (first, *_), _ = said_and_counted(limited=True)
    assert "huge pages" not in said and first > 1000


INLINE = """
from lm import allocator
allocator.keep_freed_memory()
allocator.compute_inline()
import jax
print(jax.jit(lambda x: x @ x @ x @ x)(jax.numpy.ones((2000, 2000))).is_ready())
"""


@GLIBC
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
    assert allocator._undecided({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.cpu.x86_shstk=off"})
    for name, value in (
        ("LM_ALLOCATOR", "system"),
        ("MALLOC_ARENA_MAX", "2"),
        ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=2"),
        ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=1048576"),
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
