"""The compiled part of an evaluation: packed windows in, the nats of their scored targets out.

Shapes: R rows, W positions in a row, S a slice of a row's scored targets, D model width, V vocabulary rows.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lm.config import ModelConfig, ParallelConfig
from lm.cores import have_wide_vectors
from lm.data.pipeline import Batch
from lm.evaluation.windows import Packed, Piece
from lm.nn import language_model
from lm.nn.decoder import cross_specs
from lm.nn.encoder import layer_specs
from lm.nn.head import token_nll
from lm.nn.matmul import numerics
from lm.nn.params import ParamSpec
from lm.parallel import batch_shards, constrainer, own_rows, put_rows, replicated, rules_of
from lm.sharded_attention import attend_on

LOGITS = 2**22
"""Logits that a device holds at once, in float32: 16 MB stay in or near its caches."""
CPU_LOGITS = 2**17
"""The same of a core of a CPU. Small slices also end near the last scored target: where windows overlap, many of a row
aren't."""
TARGETS = 256
"""Targets a device computes at once at the least, so that their product with the head is a big one."""
AT_ONCE = 3
"""Batches that a CPU computes at once, each from a thread of its own: XLA runs what one thread asks for one by one, and
the threads of its operations, which are small, mostly wait for each other. On two cores, two give 1.3 times as many
tokens of a model of 260,000 parameters and 1.1 of GPT-2's smallest; a third is ready when one of them ends."""
CPU_TOKENS = 512
"""Tokens that a CPU takes at once: a batch whose activations leave its caches takes two to four times as long."""


def score(
    params: Any,
    packed: Iterable[Packed],
    *,
    cfg: ModelConfig,
    mesh: Mesh,
    rules: tuple[str, ...] = (),
    greedy: bool = False,
) -> Iterator[tuple[list[Piece], tuple[np.ndarray, ...]]]:
    """Of each batch its pieces, and nats_RW, float32; with `greedy` also best_RW: whether a target is the likeliest id.

    Row and begin of a piece say where its numbers stand. A batch is fetched only once the next is under way; a CPU of
    one device computes AT_ONCE of them side by side.

    Args:
      rules: as `parallel.rules`.
    """
    alone = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
    compiling, met = threading.Lock(), set[Any]()  # else threads that meet new shapes at once compile them each

    if alone and not cfg.scan_layers:
        params = _layers_apart(params, cfg)

    def begin(each: Packed) -> Callable[[], tuple[np.ndarray, ...]]:
        """Starts a batch, and gives what waits for its numbers."""
        R, W = each.columns_RW.shape
        size = slice_size(R // batch_shards(mesh), W, cfg.padded_vocabulary, mesh)
        mine = own_rows(mesh, R)
        batch, columns_RW = jax.tree.map(lambda x: x[mine], (each.batch, each.columns_RW))
        if not alone:
            batch, columns_RW = put_rows(mesh, (batch, columns_RW))
        slices = np.int32(-(-each.scored // size))
        run = _compiled(cfg, mesh, rules, size, greedy)
        shapes = tuple(x.shape for x in jax.tree.leaves(batch))
        with contextlib.nullcontext() if shapes in met else compiling:
            result = run(params, batch, columns_RW, slices)
        met.add(shapes)
        assert result[0].shape[0] == R, "a process gave other rows than its own"
        return lambda: tuple(map(np.asarray, result))

    def whole(each: Packed) -> tuple[np.ndarray, ...]:
        return begin(each)()

    waiting: deque[tuple[list[Piece], Callable[[], tuple[np.ndarray, ...]]]] = deque()
    for each in packed:
        if alone:
            waiting.append((each.pieces, _threads().submit(whole, each).result))
        else:  # the device has the next in its queue, and all processes theirs in the same order
            waiting.append((each.pieces, begin(each)))
        if len(waiting) > (AT_ONCE if alone else 1):
            pieces, numbers = waiting.popleft()
            yield pieces, numbers()
    for pieces, numbers in waiting:
        yield pieces, numbers()


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """The same for every evaluation: memory that new ones freed would stay with them, up to 300 MB after twenty."""
    return ThreadPoolExecutor(AT_ONCE)


def rows_at_once(batch_size: int, length: int, mesh: Mesh) -> int:
    """Rows of a batch: `batch_size`, on CPUs fewer where rows are long, up to a multiple of the devices."""
    shards = batch_shards(mesh)
    if mesh.devices.flat[0].platform == "cpu":
        batch_size = min(batch_size, max(CPU_TOKENS // length, 1) * shards)
    return -(-batch_size // shards) * shards


def slice_size(rows: int, length: int, vocabulary_rows: int, mesh: Mesh) -> int:
    """Scored targets of each of a device's rows whose logits are computed at once."""
    logits = CPU_LOGITS if mesh.devices.flat[0].platform == "cpu" else LOGITS
    return min(max(max(logits // vocabulary_rows, TARGETS) // rows, 1), length)


def _layers_apart(params: Any, cfg: ModelConfig) -> Any:
    """The parameters with those of each layer in arrays of their own, matrices in the compute dtype.

    Else every batch on a CPU would copy each layer out of its stack, and cast it: of GPT-2's smallest 340 MB.
    """
    made = {**params, "layers": _apart(params["layers"], cfg=cfg)}
    if cfg.has_encoder:
        encoder = params["encoder"]
        made["encoder"] = {**encoder, "layers": _apart(encoder["layers"], cfg=cfg.encoder)}
    return made


@functools.partial(jax.jit, static_argnames="cfg")
def _apart(layers: Any, *, cfg: ModelConfig) -> tuple[Any, ...]:
    specs = {**layer_specs(cfg), **(cross_specs(cfg) if cfg.has_encoder else {})}
    dtype = numerics(cfg.compute_dtype).dtype
    as_read = jax.tree.map(
        lambda spec, w: w.astype(dtype) if spec.inputs else w, specs, layers, is_leaf=lambda x: isinstance(x, ParamSpec)
    )
    return tuple(jax.tree.map(lambda w, index=index: w[index], as_read) for index in range(cfg.num_layers))


@functools.lru_cache(maxsize=8)
def _compiled(
    cfg: ModelConfig, mesh: Mesh, changed: tuple[str, ...], size: int, greedy: bool
) -> Callable[..., tuple[jax.Array, ...]]:
    """Forward pass, then the head on the scored targets alone, `size` of each row at a time.

    Head and logsumexp are a third of the work of a GPT-2: in the sliding form most positions are context alone.
    """
    rules = rules_of(ParallelConfig(rules=changed))
    constrain = constrainer(mesh, rules)

    def nats(params: Any, batch: Batch, columns_RW: jax.Array, slices: jax.Array) -> tuple[jax.Array, ...]:
        tokens, targets_RW, _, segments, positions, source = batch
        R, W = columns_RW.shape
        source_length = None if source is None else source.tokens_BS.shape[1]
        attend = attend_on(cfg, mesh, length=W, training=False, source_length=source_length, rules=rules)
        x_RWD = language_model.forward(
            params,
            tokens,
            segments,
            positions,
            cfg=cfg,
            dropout_keys_B=None,
            constrain=constrain,
            attend=attend,
            source=source,
        )
        padded = -(-W // size) * size
        columns_RW = jnp.pad(columns_RW, ((0, 0), (0, padded - W)))

        def one(index: jax.Array, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            columns_RS = jax.lax.dynamic_slice_in_dim(columns_RW, index * size, size, axis=1)
            x_RSD = jnp.take_along_axis(x_RWD, columns_RS[:, :, None], axis=1)
            targets_RS = jnp.take_along_axis(targets_RW, columns_RS, axis=1)
            logits_RSV = language_model.logits(params, x_RSD, cfg=cfg, constrain=constrain)
            values: tuple[jax.Array, ...] = (token_nll(logits_RSV, targets_RS),)
            if greedy:
                values += (jnp.argmax(logits_RSV, axis=-1) == targets_RS,)
            update = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=index * size, axis=1)
            return tuple(update(into, value) for into, value in zip(found, values, strict=True))

        empty = [jnp.zeros((R, padded), dtype) for dtype in (jnp.float32, jnp.bool_)[: 1 + greedy]]
        return jax.lax.fori_loop(0, slices, one, tuple(empty))

    # every process gets every row
    return jax.jit(nats, out_shardings=replicated(mesh), compiler_options=_options(mesh))


def _options(mesh: Mesh) -> dict[str, Any] | None:
    """XLA's vectors are of 256 bits unless told: of twice as many it makes a tenth more tokens of a small model, whose
    time goes into what is computed number by number."""
    wide = mesh.devices.flat[0].platform == "cpu" and have_wide_vectors()
    return {"xla_cpu_prefer_vector_width": 512} if wide else None
