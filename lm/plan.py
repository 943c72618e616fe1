"""What a run will take, before anything runs: parameters, FLOPs a token, and bytes a device. Nothing is allocated.

The state's bytes are those of the real state's shapes and shardings, on a mesh of abstract devices; the activations'
are those of the arrays that the traced step keeps for its backward pass.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh

from lm.checkpoint import Loaded
from lm.config import InputError, ModelConfig, ParallelConfig, RunConfig
from lm.data import tokenizer as tokenizers
from lm.data.pipeline import Batch
from lm.fields import check_types
from lm.nn.language_model import model_specs, unconstrained
from lm.nn.params import count, map_specs
from lm.parallel import MESH_AXES, batch_shards, check_batch
from lm.training.flops import flops_per_token
from lm.training.optimizer import make_optimizer
from lm.training.state import abstract_state
from lm.training.step import batch_loss
from lm.validation import validate


@dataclasses.dataclass(frozen=True)
class Plan:
    """All in numbers of things, bytes or FLOPs; `*_bytes` are of one device.

    gradients_bytes: float32; with gradient accumulation the sum and those of one micro-batch. activations_bytes: what
    the backward pass of one micro-batch keeps. weight_copies_bytes: the weights in the compute dtype that it keeps.
    """

    parameters: int
    embedding_parameters: int
    layer_parameters: int
    layers: int
    flops_per_token: float
    attention_flops_per_token: float
    context: int
    batch_tokens: int
    mesh: dict[str, int]
    rows_per_device: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    ema_bytes: int
    activations_bytes: int
    weight_copies_bytes: int

    @property
    def total_bytes(self) -> int:
        """Of one device."""
        return sum(getattr(self, name) for name in BYTES)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields, and what follows from them."""
        return {**dataclasses.asdict(self), "total_bytes": self.total_bytes}


BYTES = {
    "weights_bytes": "weights",
    "gradients_bytes": "gradients",
    "optimizer_bytes": "optimizer",
    "ema_bytes": "moving average",
    "activations_bytes": "activations",
    "weight_copies_bytes": "weights as operands",
}
"""The parts of a device's memory, by what a reader calls them."""


def resolved(config: RunConfig, load: Callable[[str], Loaded]) -> RunConfig:
    """The validated config with what the tokenizer decides: of a BPE that is yet to be trained, tokenizer.vocab_size.

    Args:
      load: opens the model that a config goes on from.
    """
    check_types(config)
    if config.init_from is not None:
        initial = load(config.init_from)
        config = validate(config.going_on_from(initial.config.model))
        return config.resolve(initial.config.model.vocabulary)
    validate(config)
    if config.tokenizer.kind == "bpe":
        return config.resolve(config.tokenizer.vocab_size)
    return config.resolve(tokenizers.build(config.tokenizer, []).vocab_size)


def plan(cfg: RunConfig, devices: int) -> Plan:
    """What a run of a resolved and validated config takes on so many devices.

    Raises InputError where the mesh doesn't fit the devices, the batch or the model.
    """
    mesh = abstract_mesh(cfg.parallel, devices)
    check_batch(cfg.training.batch_size, cfg.training.gradient_accumulation, mesh)
    specs = model_specs(cfg.model)
    state = abstract_state(cfg, make_optimizer(cfg.optimizer, specs, mesh), mesh)
    rows = cfg.training.batch_size // batch_shards(mesh) // cfg.training.gradient_accumulation
    activations, copies = kept_bytes(cfg, rows, mesh.shape["tensor"])
    if cfg.model.remat:  # then the backward pass has one layer whole at a time
        one = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, num_layers=1))
        plain = dataclasses.replace(one, model=dataclasses.replace(one.model, remat=False))
        activations += kept_bytes(plain, rows, mesh.shape["tensor"])[0]
        activations -= kept_bytes(one, rows, mesh.shape["tensor"])[0]
    weights, whole = bytes_per_device(state.params), flops_per_token(cfg.model, cfg.data.context)
    return Plan(
        parameters=count(specs),
        embedding_parameters=count(specs["embed"]),
        layer_parameters=count(specs["layers"]) // cfg.model.num_layers,
        layers=cfg.model.num_layers,
        flops_per_token=whole,
        attention_flops_per_token=whole - flops_per_token(cfg.model, 0),
        context=cfg.data.context,
        batch_tokens=cfg.training.batch_size * cfg.data.context,
        mesh=dict(mesh.shape),
        rows_per_device=rows,
        weights_bytes=weights,
        gradients_bytes=weights * (1 if cfg.training.gradient_accumulation == 1 else 2),
        optimizer_bytes=bytes_per_device(state.opt_state),
        ema_bytes=0 if state.ema is None else bytes_per_device(state.ema),
        activations_bytes=activations,
        weight_copies_bytes=copies,
    )


def abstract_mesh(cfg: ParallelConfig, devices: int) -> Mesh:
    """`lm.parallel.make_mesh` for a number of devices that needn't be there: enough of a mesh for shardings."""
    inner = cfg.fsdp * cfg.tensor
    data = cfg.data or devices // inner
    if data * inner < 1 or data * inner > devices or (cfg.data is None and devices % inner):
        raise InputError(
            f"parallel.data {cfg.data} x fsdp {cfg.fsdp} x tensor {cfg.tensor} does not fit {devices} device(s): "
            "choose sizes whose product divides --devices"
        )
    sizes = (data, cfg.fsdp, cfg.tensor)
    return cast(Mesh, AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES)))


def bytes_per_device(tree: Any) -> int:
    """Of the part that one device holds of each array."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def kept_bytes(cfg: RunConfig, rows: int, tensor: int) -> tuple[int, int]:
    """Bytes that the forward pass of `rows` rows keeps for the backward pass: (activations, copies of weights).

    The pass is traced, not computed, with the heads, hidden units and vocabulary of one of `tensor` devices. A compiler
    may keep less, by computing something again, and needs working space besides.
    """
    model = _one_part(cfg.model, tensor)
    params = map_specs(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), model_specs(model))
    shape = (rows, cfg.data.context)
    ids, weights = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)
    batch = Batch(ids, ids, weights, ids, ids)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows)) if model.dropout else None
    loss = functools.partial(batch_loss, cfg=model, z_loss=cfg.training.z_loss, constrain=unconstrained)

    def kept(params: Any, batch: Batch, keys: Any) -> list[jax.Array]:
        return jax.tree.leaves(jax.vjp(lambda given: loss(given, batch, keys), params, has_aux=True)[1])

    program = jax.make_jaxpr(kept)(params, batch, keys).jaxpr
    of_batch = set(program.invars[len(jax.tree.leaves(params)) :])
    for equation in program.eqns:
        if any(_is_variable(one) and one in of_batch for one in equation.invars):
            of_batch |= set(equation.outvars)
    # The head's loss makes the gradient of its matrix in the forward pass: that is one of the gradients.
    head = (params["head"]["kernel"] if "kernel" in params.get("head", {}) else params["embed"]["tokens"]).shape
    made = {one for one in program.outvars if _is_variable(one) and one.aval.shape != head} - set(program.invars)
    sizes = {one: math.prod(one.aval.shape) * one.aval.dtype.itemsize for one in made}
    activations = sum(size for one, size in sizes.items() if one in of_batch)
    return activations, sum(sizes.values()) - activations


def _one_part(cfg: ModelConfig, tensor: int) -> ModelConfig:
    """The model that one of `tensor` devices computes: its heads, its hidden units, its part of the vocabulary."""
    return dataclasses.replace(
        cfg,
        num_heads=cfg.num_heads // tensor,
        num_kv_heads=cfg.kv_heads // tensor,
        head_dim=cfg.head_width,
        d_ff=cfg.ff_width // tensor,
        vocab_size=cfg.padded_vocabulary // tensor,
        vocab_multiple=1,
        # cuDNN's kernel can't be traced where there is none; it keeps what the blockwise form does
        attention="blockwise" if cfg.attention == "cudnn" else cfg.attention,
    )


def _is_variable(one: Any) -> bool:
    """Not a constant written into the program."""
    return not hasattr(one, "val")


def lines(name: str, found: Plan) -> list[str]:
    """A plan to read."""
    matrices = (found.flops_per_token - found.attention_flops_per_token) / 6
    flops = f"6 x {matrices:,.0f} + {found.attention_flops_per_token:,.0f}"
    split = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items())
    rows = f"{found.rows_per_device:,} rows of {found.context:,} tokens at once on each"
    return [
        f"plan       {name}: {found.parameters:,} parameters, {found.embedding_parameters:,} in embedding tables",
        f"           and {found.layer_parameters:,} in each of {found.layers} layers",
        f"flops      {found.flops_per_token:,.0f} a token to train on = {flops}",
        "           (6 N + 12 x heads x head width x context, over the layers: PaLM, arXiv:2204.02311, appendix B)",
        f"           {found.flops_per_token * found.batch_tokens:.3g} a step of {found.batch_tokens:,} tokens",
        f"mesh       {split}: {rows}",
        *(f"{'memory' if at == 0 else '':11}{getattr(found, field) / 1e6:>12,.1f} MB a device  {title}"
          for at, (field, title) in enumerate(BYTES.items())),
        f"           {found.total_bytes / 1e6:>12,.1f} MB a device  together, before what the compiler needs besides",
    ]  # fmt: skip
