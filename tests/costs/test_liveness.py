"""The fullest moment of small programs whose memory is known by counting."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from lm.costs.liveness import Peak, peak

N = 1000
ROW, MATRIX = 4 * N, 4 * N * N


def moment(step, *arguments, state: int = 1, platform: str = "gpu", parts: tuple[int, ...] = ()) -> Peak:
    program = jax.make_jaxpr(step)(*arguments)
    split = parts or (1,) * len(program.jaxpr.invars)
    return peak(program, split, state=state, platform=platform, parameters=[(N, N)])


w, x = jax.ShapeDtypeStruct((N, N), jnp.float32), jax.ShapeDtypeStruct((N,), jnp.float32)


def test_element_wise_operations_are_not_stored_between_products():
    def step(w, x):
        return w, jnp.tanh(2.0 * (x @ w) + 1.0) @ w

    assert moment(step, w, x).total == 2 * ROW  # what is multiplied, and the result


def test_what_is_read_twice_is_stored_if_it_is_dear():
    def step(w, x):
        y = jnp.exp(x @ w)
        return w, (y @ w) + (y * y) @ w

    assert moment(step, w, x).total == pytest.approx(3 * ROW)


def test_a_donated_argument_is_overwritten():
    assert moment(lambda w, x: (w - 0.1 * jnp.outer(x, x), x.sum()), w, x).total <= 8
    assert moment(lambda w, x: (w @ w, x.sum()), w, x).total <= 8  # given its place, not its time


def test_a_loop_holds_its_body_once():
    def step(w, x):
        return w, lax.scan(lambda y, _: (jnp.tanh(y @ w), None), x, None, length=7)[0]

    assert moment(step, w, x).total <= 3 * ROW


def test_gradients_and_weights_are_told_apart():
    def step(w, x):
        loss = lambda w: jnp.sum(jnp.tanh(x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)))  # noqa: E731
        return w - jax.grad(loss)(w), x.sum()

    found = moment(step, w, x)
    assert found.weights in (0, MATRIX // 2) and found.gradients <= MATRIX
    assert found.copies == 0


def test_a_cpu_copies_what_is_read_beside_its_result():
    """Both moments of AdamW, in short: m is read for the new w and for the new m."""

    def step(m, w, x):
        new, finite = 0.9 * m + jnp.outer(x, x), x[0] > 0
        return jnp.where(finite, new, m), jnp.where(finite, w - 0.1 * new, w), x.sum()

    assert moment(step, w, w, x, state=2, platform="cpu").copies == MATRIX
    assert moment(step, w, w, x, state=2).copies == 0


def test_a_device_holds_its_part():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    of_rows = jax.sharding.PartitionSpec("fsdp")

    def local(w, x):
        whole = lax.all_gather(w, "fsdp", tiled=True)
        return lax.psum_scatter(jnp.outer(x, jnp.tanh(x @ whole)), "fsdp", tiled=True)

    spread = jax.shard_map(local, mesh=mesh, in_specs=(of_rows, None), out_specs=of_rows, check_vma=False)
    found = moment(lambda w, x: (w - spread(w, x), x.sum()), w, x, parts=(8, 1))
    assert MATRIX < found.total < 1.3 * MATRIX  # whole: the weights, then their gradient; a part: the scattered one
