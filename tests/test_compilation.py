"""The compilation cache: what a process compiles the next one finds, and a broken entry is compiled again."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from lm import compilation

PROGRAM = """
import jax, jax.numpy as jnp
from lm import compilation
compilation.keep()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
with compilation.said("it", print):
    jax.jit(lambda x: jnp.sin(x) @ x)(jax.device_put(jnp.ones((8, 8)))).block_until_ready()
"""


def run(folder, **environment):
    names = ("JAX_NUMPY_RANK_PROMOTION", "XLA_FLAGS")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**inherited, "LM_CACHE": str(folder), **environment},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert not result.stderr, result.stderr
    return result.stdout


def entries(folder):
    return sorted(folder.glob("compiled/*/*-cache"))


def test_the_next_process_finds_it_unless_it_is_broken_or_the_cache_is_off(tmp_path):
    assert "(cached)" not in run(tmp_path)
    assert entries(tmp_path)
    assert "(cached)" in run(tmp_path)
    assert "(cached)" not in run(tmp_path, JAX_ENABLE_COMPILATION_CACHE="0")
    assert not list((tmp_path / "other").glob("compiled/*")) and "(cached)" not in run(
        tmp_path / "other", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine")
    )
    assert not (tmp_path / "other" / "compiled").exists()
    for path in entries(tmp_path):
        path.write_bytes(path.read_bytes()[:100])
    assert "(cached)" not in run(tmp_path)


def test_what_a_killed_process_left_is_cleared(tmp_path):
    old, new, whole = (tmp_path / f"{name}-cache" for name in ("old", "new", "whole"))
    for path in (old, new, whole):
        path.write_bytes(b"half")
    (tmp_path / "whole-atime").write_bytes(b"01234567")
    for path in (old, whole):
        os.utime(path, (time.time() - 3600,) * 2)
    compilation._clear_half_written(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new-cache", "whole-atime", "whole-cache"]


@pytest.mark.parametrize("name", ["_processor"])
def test_another_processor_has_a_folder_of_its_own(monkeypatch, name):
    before = compilation.environment()
    assert before == compilation.environment()
    monkeypatch.setattr(compilation, name, lambda: "another")
    assert before != compilation.environment()
