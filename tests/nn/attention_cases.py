"""Attention problems of every form, to hold a back end against the reference: values and gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lm.nn.attention import AttentionMask, attend
from lm.nn.matmul import numerics

SCALE, WIDTH = 0.3, 8


def arrays(T, N, K, *, B=2, H=WIDTH, S=None):
    """q_BTNH, k_BSKH, v_BSKH, float32, large enough for caps to bite."""
    shapes = [(B, T, N, H), (B, S or T, K, H), (B, S or T, K, H)]
    return [2 * jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


def segments(B, T):
    """Up to four pieces a row, cut elsewhere in every row, the last one padding."""
    return jnp.sort(jax.random.randint(jax.random.key(9), (B, T), 0, 4), axis=1)[:, ::-1]


def compute(back_end, q, k, v, mask, *, softcap=None, dtype="float32"):
    """o_BTNH, compiled."""

    @jax.jit
    def run(q, k, v, segments):
        own = mask._replace(query_segments_BT=segments[0], key_segments_BS=segments[1])
        return back_end(q, k, v, own, scale=SCALE, softcap=softcap, numerics=numerics(dtype), dropout=None)

    return run(q, k, v, (mask.query_segments_BT, mask.key_segments_BS))


def value_and_gradients(back_end, q, k, v, mask, *, softcap=None, dtype="float32"):
    """o and the gradients of a random projection of it by q, k and v."""

    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def loss(q, k, v, segments):
        own = mask._replace(query_segments_BT=segments[0], key_segments_BS=segments[1])
        o = compute(back_end, q, k, v, own, softcap=softcap, dtype=dtype)
        return jnp.sum(o * jax.random.normal(jax.random.key(7), o.shape)), o

    (_, o), gradients = jax.jit(loss)(q, k, v, (mask.query_segments_BT, mask.key_segments_BS))
    return o, *gradients


def assert_equals_reference(back_end, q, k, v, mask, *, softcap=None, tolerance=1e-5, dtype="float32"):
    """1e-5 of the largest entry: float32 in another order of summation."""
    got = value_and_gradients(back_end, q, k, v, mask, softcap=softcap, dtype=dtype)
    wanted = value_and_gradients(attend, q, k, v, mask, softcap=softcap)
    for name, a, b in zip(("o", "dq", "dk", "dv"), got, wanted, strict=True):
        assert a.shape == b.shape
        largest = max(float(jnp.abs(b).max()), 1.0)
        np.testing.assert_allclose(a, b, atol=tolerance * largest, rtol=0, err_msg=name)


def packed(B, T, **more):
    ids = segments(B, T)
    return AttentionMask(query_segments_BT=ids, key_segments_BS=ids, **more)
