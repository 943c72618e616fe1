"""The chunked loss of the head beside the whole one: seconds, and memory, of the loss and its gradients.

    python -m benchmarks.head [--case tiny|gpt2|model] [--dtype bfloat16] [--repeats N] [--json FILE]

`tiny`: the head alone, 16 rows of 128 over 2048 ids, D 128. `model`: the whole tiny preset of that size. `gpt2`: the
head alone, 8 rows of 1024 over 50 304 ids, D 768; minutes a pair on a CPU. Both forms alternate in one process, after a
run each that isn't counted; a ratio is the median over pairs. The peak of memory (VmHWM) is that of a process of its
own that compiles and runs the gradients of one form.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lm.api import preset
from lm.nn import language_model, params
from lm.nn.chunked_nll import chunk_length, head_loss
from lm.nn.language_model import unconstrained
from lm.nn.matmul import numerics

CASES = {"tiny": (16, 128, 128, 2048), "gpt2": (8, 1024, 768, 50_304), "model": (16, 128, 128, 2048)}


def program(case: str, dtype: str, form: str) -> tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]:
    """The compiled gradient and loss of a form, and arguments for both."""
    B, T, D, V = CASES[case]
    chunk = chunk_length(B, D, V) if form == "chunked" else T
    keys = jax.random.split(jax.random.key(0), 3)
    targets_BT = jax.random.randint(keys[2], (B, T), 0, V)
    model = preset("tiny").resolve(V).model
    tree: Any = {"embed": {"tokens": 0.02 * jax.random.normal(keys[0], (V, D))}}
    read: Any = jax.random.normal(keys[1], (B, T, D)).astype(numerics(dtype).dtype)
    if case == "model":
        tree, read = params.initialize(language_model.model_specs(model), keys[0]), jnp.zeros((B, 0))

    def loss(tree: Any, read: jax.Array) -> jax.Array:
        positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
        if case == "model":
            read = language_model.forward(
                tree, targets_BT, None, positions_BT, cfg=model, dropout_keys_B=None, constrain=unconstrained
            )
        objective, _ = head_loss(
            tree, read, targets_BT, jnp.ones((B, T)),
            vocabulary=V, softcap=None, z_loss=None, numerics=numerics(dtype), constrain=unconstrained, chunk=chunk,
        )  # fmt: skip
        return objective

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(tree, read).compile()
    return gradient, jax.jit(loss).lower(tree, read).compile(), (tree, read)


def seconds(function: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - begin


def peak(case: str, dtype: str, form: str) -> float:
    """MB that a process takes which computes one form's gradients."""
    command = [sys.executable, "-m", "benchmarks.head", "--case", case, "--dtype", dtype, "--alone", form]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def alone(case: str, dtype: str, form: str) -> float:
    gradient, _, arguments = program(case, dtype, form)
    seconds(gradient, arguments)
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1e3


def measure(case: str, dtype: str, repeats: int) -> dict[str, float | str]:
    forms = {form: program(case, dtype, form) for form in ("whole", "chunked")}
    found: dict[str, float | str] = {"case": case, "dtype": dtype, "device": jax.devices()[0].device_kind}
    times: dict[tuple[str, int], list[float]] = {(form, part): [] for form in forms for part in (0, 1)}
    for repeat in range(repeats + 1):
        for (form, part), spent in times.items():
            once = seconds(forms[form][part], forms[form][2])
            if repeat:
                spent.append(once)
    for part, name in enumerate(("gradients", "loss")):
        whole, chunked = times["whole", part], times["chunked", part]
        ratios = [b / a for a, b in zip(whole, chunked, strict=True)]
        found[f"{name}: seconds whole"], found[f"{name}: seconds chunked"] = map(statistics.median, (whole, chunked))
        found[f"{name}: chunked / whole, median"] = statistics.median(ratios)
        for form, compiled in forms.items():
            found[f"{name}: temporary MB {form}"] = compiled[part].memory_analysis().temp_size_in_bytes / 1e6
    return found | {f"gradients: peak MB {form}": peak(case, dtype, form) for form in forms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="tiny")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", choices=("whole", "chunked"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(alone(options.case, options.dtype, options.alone))
        return
    found = measure(options.case, options.dtype, options.repeats)
    for name, value in found.items():
        print(f"{name:36} {value if isinstance(value, str) else format(value, '.4g')}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
