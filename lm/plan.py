"""What a run will take, before anything runs: parameters, FLOPs a token, and bytes a device. Nothing is allocated.

The state's bytes are those of the real state's shapes and shardings, on a mesh of abstract devices; all others are
those of the arrays that are alive at the fullest moment of the traced step.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lm.checkpoint import Loaded
from lm.config import InputError, ModelConfig, ParallelConfig, RunConfig, SourceTokenizerConfig, TokenizerConfig
from lm.costs.liveness import Peak, peak
from lm.data import tokenizer as tokenizers
from lm.data.pipeline import Batch
from lm.fields import check_types
from lm.fsdp import exchange
from lm.nn.attention_backend import Site, choose
from lm.nn.language_model import model_specs
from lm.nn.matmul import numerics
from lm.nn.params import count, is_spec
from lm.nn.source import Source
from lm.parallel import MESH_AXES, RULES, batch_shards, check_batch, replicated, rules_of
from lm.sharded_attention import bound
from lm.training.flops import attention_flops_per_token, flops_per_token
from lm.training.lowering import optimizer_on
from lm.training.state import TrainState, abstract_state
from lm.training.step import train_step
from lm.validation import validate


@dataclasses.dataclass(frozen=True)
class Plan:
    """All in numbers of things, bytes or FLOPs; `*_bytes` are of one device. With an encoder, tokens are those of
    targets; without one its numbers are 0.

    The state and the batch are there all the time. The others are what the step holds besides at its fullest moment:
    gradients_bytes, of parameters, of a stack or of a layer; activations_bytes, and what is made of them on the way;
    weight_copies_bytes, of weights as operands and of gathered ones; cpu_copies_bytes, of the optimizer's state, which
    only XLA's CPU back end makes.
    """

    parameters: int
    embedding_parameters: int
    layer_parameters: int
    layers: int
    flops_per_token: float
    attention_flops_per_token: float
    encoder_layer_parameters: int
    encoder_layers: int
    context: int
    source_context: int
    batch_tokens: int
    mesh: dict[str, int]
    rows_per_device: int
    batch_bytes: int
    weights_bytes: int
    optimizer_bytes: int
    ema_bytes: int
    gradients_bytes: int
    activations_bytes: int
    weight_copies_bytes: int
    cpu_copies_bytes: int

    @property
    def total_bytes(self) -> int:
        """Of one device."""
        return sum(getattr(self, name) for name in BYTES)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields, and what follows from them."""
        return {**dataclasses.asdict(self), "total_bytes": self.total_bytes}


BYTES = {
    "batch_bytes": "batch",
    "weights_bytes": "weights",
    "optimizer_bytes": "optimizer",
    "ema_bytes": "moving average",
    "gradients_bytes": "gradients",
    "activations_bytes": "activations",
    "weight_copies_bytes": "weights as operands",
    "cpu_copies_bytes": "copies that only a CPU makes",
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
        return config.resolve(initial.config.model.vocabulary, initial.config.model.source_vocab_size)
    validate(config)
    own = config.source_tokenizer if config.model.has_encoder and config.source_tokenizer.kind != "shared" else None
    return config.resolve(_vocab_size(config.tokenizer), None if own is None else _vocab_size(own))


def _vocab_size(tokenizer: TokenizerConfig | SourceTokenizerConfig) -> int:
    if tokenizer.kind == "bpe":
        return tokenizer.vocab_size
    assert tokenizer.kind != "shared"
    return tokenizers.build(TokenizerConfig(tokenizer.kind, tokenizer.path), []).vocab_size


def plan(cfg: RunConfig, devices: int, platform: str = "cpu") -> Plan:
    """What a run of a resolved and validated config takes on so many devices of a platform ("cpu", "gpu" or "tpu").

    Raises InputError where the mesh doesn't fit the devices, the batch or the model.
    """
    mesh = abstract_mesh(cfg.parallel, devices)
    check_batch(cfg.training.batch_size, cfg.training.gradient_accumulation, mesh)
    specs = model_specs(cfg.model)
    state = abstract_state(cfg, optimizer_on(cfg, mesh), mesh)
    moment, batch = fullest(cfg, mesh, platform, state)
    lengths = cfg.data.context, cfg.data.source_length
    encoder = specs.get("encoder", {})
    return Plan(
        parameters=count(specs),
        embedding_parameters=count(specs["embed"]) + count(encoder.get("embed", {})),
        layer_parameters=count(specs["layers"]) // cfg.model.num_layers,
        layers=cfg.model.num_layers,
        flops_per_token=flops_per_token(cfg.model, *lengths),
        attention_flops_per_token=attention_flops_per_token(cfg.model, *lengths),
        encoder_layer_parameters=count(encoder["layers"]) // cfg.model.source_layers if encoder else 0,
        encoder_layers=cfg.model.source_layers if encoder else 0,
        context=cfg.data.context,
        source_context=cfg.data.source_length if encoder else 0,
        batch_tokens=cfg.training.batch_size * cfg.data.context,
        mesh=dict(mesh.shape),
        rows_per_device=cfg.training.batch_size // batch_shards(mesh) // cfg.training.gradient_accumulation,
        batch_bytes=batch,
        weights_bytes=bytes_per_device(state.params),
        optimizer_bytes=bytes_per_device(state.opt_state),
        ema_bytes=0 if state.ema is None else bytes_per_device(state.ema),
        gradients_bytes=moment.gradients,
        activations_bytes=moment.activations,
        weight_copies_bytes=moment.weights,
        cpu_copies_bytes=moment.copies,
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


def fullest(cfg: RunConfig, mesh: Mesh, platform: str, state: TrainState) -> tuple[Peak, int]:
    """The fullest moment of the step on one device, and the bytes of its part of the batch.

    The step is traced, not computed, with the exchange over data and fsdp as it runs, and with the heads, hidden units
    and vocabulary of one of the devices on `tensor`.
    """
    tensor, part = mesh.shape["tensor"], dataclasses.replace(cfg, model=_one_part(cfg.model, mesh.shape["tensor"]))
    mesh = abstract_mesh(ParallelConfig(mesh.shape["data"], mesh.shape["fsdp"]), math.prod(mesh.shape.values()))
    specs, rules = model_specs(part.model), rules_of(cfg.parallel)
    optimizer = optimizer_on(part, mesh)
    if tensor > 1:
        state = abstract_state(part, optimizer, mesh)
    batch = abstract_batch(cfg, mesh)
    given = exchange(mesh, specs, dtype=numerics(cfg.model.compute_dtype).dtype, rules=rules)
    step = functools.partial(
        train_step,
        cfg=part,
        optimizer=optimizer,
        constrain=given.constrain,
        attend=bound(attention(part, platform), mesh, manual=given.manual, rules=rules),
        total=given.total,
        gather=given.gather,
        spread=given.spread,
    )
    arguments = (state, batch, jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh)))
    program = jax.make_jaxpr(step)(*jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments))
    leaves = jax.tree.leaves(arguments)
    parts = [math.prod(x.shape) // math.prod(x.sharding.shard_shape(x.shape)) for x in leaves]
    found = peak(
        program,
        parts,
        state=len(jax.tree.leaves(state)),
        platform=platform,
        parameters=gradient_shapes(specs, state.params),
    )
    return found, bytes_per_device(batch)


def gradient_shapes(specs: Any, params: Any) -> set[tuple[int, ...]]:
    """The shapes that gradients take: of whole parameters and a device's parts, of stacks and of one layer, as declared
    and as the matrices that products make."""
    found = set()
    leaves = zip(jax.tree.leaves(specs, is_leaf=is_spec), jax.tree.leaves(params), strict=True)
    for spec, leaf in leaves:
        for shape in (leaf.shape, leaf.sharding.shard_shape(leaf.shape)):
            layers = 1 if spec.axes[0] == "layers" else 0
            inputs = layers + (spec.inputs or 0)
            flat = (math.prod(shape[layers:inputs]), math.prod(shape[inputs:]))
            found |= {shape, shape[layers:], flat, (*shape[:layers], *flat)}
    return found


def abstract_batch(cfg: RunConfig, mesh: Mesh) -> Batch:
    """The shapes of a global batch, split over a mesh by rows."""
    rows = NamedSharding(mesh, PartitionSpec(RULES["batch"]))

    def one(length: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((cfg.training.batch_size, length), dtype, sharding=rows)

    ids, weights = one(cfg.data.context, jnp.int32), one(cfg.data.context, jnp.float32)
    source = Source(*[one(cfg.data.source_length, jnp.int32)] * 3) if cfg.model.has_encoder else None
    return Batch(ids, ids, weights, ids, ids, source)


def attention(cfg: RunConfig, platform: str) -> str:
    """The back end that computes attention on a platform, or one that can be traced anywhere and holds as much."""
    capability = (9, 0) if platform == "gpu" else None
    dropout = cfg.model.dropout > 0
    source_length = cfg.data.source_length if cfg.model.has_encoder else None
    site = Site(platform, capability, cfg.data.context, True, dropout, training=True, source_length=source_length)
    named = cfg.model.attention
    name = choose(cfg.model, site).name if named == "auto" else named
    return "blockwise" if name == "cudnn" else name


def _one_part(cfg: ModelConfig, tensor: int) -> ModelConfig:
    """The model that one of `tensor` devices computes: its heads, its hidden units, its part of the vocabulary."""
    own = cfg.padded_source_vocabulary if cfg.has_encoder and not cfg.share_embeddings else None
    return dataclasses.replace(
        cfg,
        num_heads=cfg.num_heads // tensor,
        num_kv_heads=cfg.kv_heads // tensor,
        head_dim=cfg.head_width,
        d_ff=cfg.ff_width // tensor,
        vocab_size=cfg.padded_vocabulary // tensor,
        source_vocab_size=None if own is None else own // tensor,
        vocab_multiple=1,
    )


def lines(name: str, found: Plan) -> list[str]:
    """A plan to read."""
    matrices = (found.flops_per_token - found.attention_flops_per_token) / 6
    flops = f"6 x {matrices:,.0f} + {found.attention_flops_per_token:,.0f}"
    split = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items())
    rows = f"{found.rows_per_device:,} rows of {found.context:,} tokens at once on each"
    layers = f"{found.layer_parameters:,} in each of {found.layers} layers"
    if found.encoder_layers:
        layers += f", {found.encoder_layer_parameters:,} in each of the encoder's {found.encoder_layers}"
        rows += f", with sources of {found.source_context:,}"
    return [
        f"plan       {name}: {found.parameters:,} parameters, {found.embedding_parameters:,} in embedding tables",
        f"           and {layers}",
        f"flops      {found.flops_per_token:,.0f} a token to train on = {flops}",
        "           (6 N + 12 x heads x head width x context, over the layers: PaLM, arXiv:2204.02311, appendix B)",
        f"           {found.flops_per_token * found.batch_tokens:.3g} a step of {found.batch_tokens:,} tokens",
        f"mesh       {split}: {rows}",
        *(f"{'memory' if at == 0 else '':11}{getattr(found, field) / 1e6:>12,.1f} MB a device  {title}"
          for at, (field, title) in enumerate(BYTES.items())),
        f"           {found.total_bytes / 1e6:>12,.1f} MB a device  together, at the step's fullest moment",
    ]  # fmt: skip
