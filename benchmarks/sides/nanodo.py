"""nanodo's model (Flax Linen), from a checkout, with the same AdamW from Optax that it is trained with.

SPEC: {"checkout": DIR, "workload": {...}, "dtype": "float32" or "bfloat16"}. Only its model file is imported: its
training script needs packages of its own for data and logging.
"""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.serving import Side, serve
from benchmarks.workloads import random_rows


def build(spec: dict[str, Any]) -> Side:
    sys.path.insert(0, spec["checkout"])
    from nanodo.model import DoConfig, TransformerDo

    shape = spec["workload"]
    config = DoConfig(
        D=shape["width"],
        H=shape["heads"],
        L=shape["context"],
        N=shape["layers"],
        V=shape["vocabulary"],
        F=4 * shape["width"],
        dtype=getattr(jnp, spec["dtype"]),
        fsdp_enabled=False,
    )
    model = TransformerDo(config)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, b1=0.9, b2=0.99, weight_decay=0.1))
    batches = [tuple(ids.astype(np.int32) for ids in pair) for pair in random_rows(spec["workload"])]
    params = jax.jit(model.init)(jax.random.key(0), batches[0][0])
    opt_state = jax.jit(optimizer.init)(params)

    def loss_of(params: Any, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        logits = model.apply(params, tokens)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def step(params: Any, opt_state: Any, tokens: jax.Array, targets: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_of)(params, tokens, targets)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    compiled = jax.jit(step, donate_argnums=(0, 1))

    def run(steps: int) -> None:
        nonlocal params, opt_state
        for number in range(steps):
            batch = jax.device_put(batches[number % len(batches)])
            params, opt_state, loss = compiled(params, opt_state, *batch)
        jax.block_until_ready((params, loss))

    device = jax.devices()[0]
    facts = {"parameters": sum(leaf.size for leaf in jax.tree.leaves(params))}
    return Side(run, facts, lambda: (device.memory_stats() or {}).get("peak_bytes_in_use"))


if __name__ == "__main__":
    serve(build)
