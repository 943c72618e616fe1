"""Adam's numbers and state are Optax's; no moment is copied; a step that isn't finite leaves them alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.training.adam import scale_by_adam

SHAPE = (96, 80)


@pytest.fixture(scope="module")
def gradients():
    return [{"w": jax.random.normal(jax.random.key(i), SHAPE), "b": jnp.full((3,), 0.1 * i)} for i in range(4)]


def test_directions_and_state_are_those_of_optax(gradients):
    """Float32, 1e-6 relative."""
    ours, theirs = scale_by_adam(0.8, 0.95, 1e-8), optax.scale_by_adam(0.8, 0.95, 1e-8)
    a, b = ours.init(gradients[0]), theirs.init(gradients[0])
    assert jax.tree.structure(a) == jax.tree.structure(b), "checkpoints hold it"
    for each in gradients:
        found, a = ours.update(each, a)
        expected, b = theirs.update(each, b)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), (found, a), (expected, b))


def test_a_step_that_is_not_finite_leaves_the_state_as_it_is(gradients):
    rule = scale_by_adam(0.8, 0.95, 1e-8)
    _, state = rule.update(gradients[0], rule.init(gradients[0]))
    bad = jax.tree.map(lambda g: g.at[0].set(jnp.nan), gradients[1])
    _, kept = jax.jit(rule.update)(bad, state, finite=jnp.bool_(False))
    jax.tree.map(np.testing.assert_array_equal, kept, state)


def copies_of_moments(rule: optax.GradientTransformationExtraArgs, finite: bool) -> int:
    """In a compiled update of one matrix whose parameters and state are donated."""

    def step(w, state, g, ok):
        more = {"finite": ok} if finite else {}
        direction, new = rule.update(g, state, w, **more)
        new = new if finite else jax.tree.map(lambda x, y: jnp.where(ok, x, y), new, state)
        return jnp.where(ok, w - 0.1 * direction, w), new

    w = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    state = jax.eval_shape(rule.init, w)
    text = jax.jit(step, donate_argnums=(0, 1)).lower(w, state, w, jax.ShapeDtypeStruct((), bool)).compile().as_text()
    return sum("= f32[96,80]" in line and " copy(" in line for line in text.splitlines())


def test_no_moment_is_copied():
    assert copies_of_moments(scale_by_adam(0.8, 0.95, 1e-8), finite=True) == 0


def test_optax_copies_them():
    """Else the rule of our own has no reason any more."""
    assert copies_of_moments(optax.with_extra_args_support(optax.scale_by_adam(0.8, 0.95)), finite=False) > 0
