"""The optimizers, from Optax; Muon's orthogonalisation is in `lm/training/muon.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lm.config import OptimizerConfig
from lm.nn.matmul import numerics
from lm.nn.params import ParamSpec, Specs, map_specs
from lm.parallel import RULES, Rules
from lm.training.adam import scale_by_adam
from lm.training.muon import polynomials, scale_by_muon

Array = jax.Array


def make_optimizer(
    cfg: OptimizerConfig, specs: Specs, mesh: Mesh | None = None, rules: Rules = RULES
) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm, the rule, decoupled weight decay and the groups' factors, for a learning rate of 1.

    `apply_updates` brings the learning rate in, which depends on the budget as well as on the step. `update` takes sums
    of gradients with `count` (default 1), what to divide them by, `norm`, the global norm of that mean if it is known,
    and `finite` (default True): where that is False the state stays as it is.

    Args:
      mesh: where the parameters lie, by the rules; Muon shares its layers out over it. None: on one device, or under
        pmap.
    """
    factors = {"embedding": cfg.embedding_factor, "head": cfg.head_factor, "vector": cfg.vector_factor}
    parts = [
        _clipped_mean(cfg.clip_norm),
        _OF_NAME[cfg.name](cfg, specs, mesh, rules),
        optax.add_decayed_weights(cfg.weight_decay, mask=decay_mask(specs)),
    ]
    if set(factors.values()) != {1.0}:
        each = map_specs(lambda spec: factors.get(group(spec), 1.0), specs)
        parts.append(optax.stateless(lambda updates, _: jax.tree.map(lambda u, factor: factor * u, updates, each)))
    return optax.chain(*parts)


def group(spec: ParamSpec) -> str:
    """What a parameter is to the optimizer: a "matrix" of the layers, an "embedding" table, the "head" or a "vector".

    A table that is the head too is an embedding. Vectors are all that only scales or shifts: norms and biases.
    """
    if spec.inputs is None:
        return "vector"
    if spec.axes[0] == "layers":
        return "matrix"
    return "head" if spec.axes[-1] == "vocab" else "embedding"


def decay_mask(specs: Specs) -> Any:
    """True for matrices and tables, False for norms and biases: every parameter is one or the other."""
    return map_specs(lambda spec: spec.inputs is not None, specs)


def apply_updates(params: Any, updates: Any, rate: Array) -> Any:
    """params - rate · updates."""
    return jax.tree.map(lambda p, u: p - rate * u, params, updates)


def _clipped_mean(limit: float | None) -> optax.GradientTransformationExtraArgs:
    """Sums of gradients over `count` tokens to their mean, clipped to a global norm, in one pass over them.

    `update` takes `count` and the mean's `norm`, which is computed where it isn't given.
    """

    def update(
        sums: Any, state: Any, params: Any = None, *, count: Array | float = 1.0, norm: Array | None = None, **_: Any
    ) -> tuple[Any, Any]:
        factor = 1.0 / count
        if limit is not None:
            norm = optax.tree.norm(sums) / count if norm is None else norm
            factor = factor * jnp.minimum(1.0, limit / norm)
        return jax.tree.map(lambda g: factor * g, sums), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _kept_unless_finite(rule: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The rule, whose `update` takes `finite`: where that is False its state stays as it is."""

    def update(
        updates: Any, state: Any, params: Any = None, *, finite: Array | bool = True, **_: Any
    ) -> tuple[Any, Any]:
        updates, new = rule.update(updates, state, params)
        return updates, jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)

    return optax.GradientTransformationExtraArgs(rule.init, update)


def _adamw(cfg: OptimizerConfig, specs: Specs, mesh: Mesh | None, rules: Rules) -> optax.GradientTransformation:
    """Loshchilov & Hutter 2019, arXiv:1711.05101."""
    return scale_by_adam(cfg.beta1, cfg.beta2, cfg.epsilon)


def _muon(cfg: OptimizerConfig, specs: Specs, mesh: Mesh | None, rules: Rules) -> optax.GradientTransformation:
    """Muon for the matrices of the layers, AdamW for embeddings, head and vectors."""
    matrices = scale_by_muon(
        specs,
        momentum=cfg.momentum,
        steps=polynomials(cfg.newton_schulz, cfg.newton_schulz_steps),
        numerics=numerics(cfg.newton_schulz_dtype),
        mesh=mesh,
        rules=rules,
        by_head=cfg.muon_by_head,
    )
    labels = map_specs(lambda spec: "matrices" if group(spec) == "matrix" else "others", specs)
    matrices = _kept_unless_finite(matrices)
    return optax.partition({"matrices": matrices, "others": _adamw(cfg, specs, mesh, rules)}, labels)


def _lion(cfg: OptimizerConfig, specs: Specs, mesh: Mesh | None, rules: Rules) -> optax.GradientTransformation:
    """Chen et al. 2023, arXiv:2302.06675."""
    return _kept_unless_finite(optax.scale_by_lion(b1=cfg.beta1, b2=cfg.beta2))


def _adafactor(cfg: OptimizerConfig, specs: Specs, mesh: Mesh | None, rules: Rules) -> optax.GradientTransformation:
    """Shazeer & Stern 2018, arXiv:1804.04235: factored second moments, clipped and relative updates, no momentum."""
    rule = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())
    return _kept_unless_finite(rule)


def _sgd(cfg: OptimizerConfig, specs: Specs, mesh: Mesh | None, rules: Rules) -> optax.GradientTransformation:
    return _kept_unless_finite(optax.trace(cfg.beta1) if cfg.beta1 else optax.identity())


_OF_NAME: dict[str, Callable[[OptimizerConfig, Specs, Mesh | None, Rules], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "muon": _muon,
    "lion": _lion,
    "adafactor": _adafactor,
    "sgd": _sgd,
}
