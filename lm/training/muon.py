"""Muon's orthogonalisation of updates (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

Every matrix of every layer is orthogonalised by itself: a stack [L, ...] is L of them, and an array that holds several
side by side (`ParamSpec.pieces`: query, key, value) is taken apart first, and on demand each of these into heads. All
matrices of one shape go through one batched iteration.

Shapes: L layers, R inputs and C outputs of a matrix, Z matrices of one shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, chain, islice, repeat
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from lm.nn.matmul import Numerics, product
from lm.nn.params import ParamSpec
from lm.parallel import RULES, Rules, sharding

Array = jax.Array

JORDAN = (3.4445, -4.7750, 2.0315)
"""a, b, c of the quintic whose iteration takes singular values in (0, 1] to about 0.7 to 1.2 in five steps (Jordan et
al.)."""
_SAFETY = 1.01
POLAR_EXPRESS = tuple(
    (a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5)
    for a, b, c in (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    )
)
"""Of the first steps one after another: the best there are for singular values from 0.001 to 1, with some room for
rounding (Amsel et al. 2025, arXiv:2505.16932, algorithm 1). Those of at least 0.001 end between 0.13 and 1.87 with
three steps, 0.42 and 1.56 with four, 0.84 and 1.13 with five."""
LAST = (1.875, -1.25, 0.375)
"""Of the steps after these."""
Polynomials = tuple[tuple[float, float, float], ...]
HEADS = ("heads", "kv_heads")
"""Axes of heads: the last axis but one of a matrix whose outputs they are."""
LEG = 3
"""Steps that a wide matrix does by its Gram matrix before that is made anew: see `_by_gram`."""
RMS = 0.2
"""Root mean square of an update's entries, as AdamW's are: one learning rate and weight decay then serve both
(Moonlight, Liu et al. 2025, arXiv:2502.16982, section 2.2)."""


def polynomials(name: str, steps: int) -> Polynomials:
    """a, b, c of each step: of `jordan` always the same, of `polar_express` its own."""
    if name == "jordan":
        return (JORDAN,) * steps
    return tuple(islice(chain(POLAR_EXPRESS, repeat(LAST)), steps))


def newton_schulz(x_ZRC: Array, *, steps: Polynomials, numerics: Numerics) -> Array:
    """Each matrix near the nearest semi-orthogonal one, U Vᵀ of its singular value decomposition; float32, R <= C.

    Iterates x <- p x, p = a + b A + c A², A = x xᵀ, from x / |x|_F, for the a, b, c of each of `steps`. Zero stays
    zero.
    """
    x_ZRC = x_ZRC.astype(jnp.float32)  # float32: the sum of a million squares
    x_ZRC = x_ZRC / (jnp.sqrt(jnp.sum(jnp.square(x_ZRC), axis=(1, 2), keepdims=True)) + 1e-7)
    R, C = x_ZRC.shape[1:]
    if C >= 2 * R and numerics.dtype == "float32":
        for first in range(0, len(steps), LEG):
            x_ZRC = _by_gram(x_ZRC, steps[first : first + LEG], numerics)
        return x_ZRC
    for a, b, c in steps:
        gram_ZRR = product(x_ZRC, x_ZRC, True, numerics)
        polynomial_ZRR = b * gram_ZRR + c * product(gram_ZRR, gram_ZRR, False, numerics)
        x_ZRC = a * x_ZRC + product(polynomial_ZRR, x_ZRC, False, numerics)
    return x_ZRC


def _by_gram(x_ZRC: Array, steps: Polynomials, numerics: Numerics) -> Array:
    """The same steps by A alone: x <- p x makes A <- p A p, and the p, which commute, meet x at the end. Two products
    as wide as x, not two a step.

    The rounding of A, which hides small singular values, grows by a² a step: over three to 1e-5 of x in float32; in
    bfloat16 it is too much.
    """
    gram_ZRR = product(x_ZRC, x_ZRC, True, numerics)
    one_1RR = jnp.eye(x_ZRC.shape[1])[None]
    passed_ZRR = None  # the product of the p so far
    for step, (a, b, c) in enumerate(steps, 1):
        p_ZRR = a * one_1RR + b * gram_ZRR + c * product(gram_ZRR, gram_ZRR, False, numerics)
        passed_ZRR = p_ZRR if passed_ZRR is None else product(p_ZRR, passed_ZRR, False, numerics)
        if step < len(steps):
            gram_ZRR = product(product(p_ZRR, gram_ZRR, False, numerics), p_ZRR, False, numerics)
    assert passed_ZRR is not None, "at least one step"
    return product(passed_ZRR, x_ZRC, False, numerics)


def orthogonalize(
    specs: Sequence[ParamSpec],
    arrays: Sequence[Array],
    *,
    steps: Polynomials,
    numerics: Numerics,
    mesh: Mesh | None,
    rules: Rules = RULES,
    by_head: bool = False,
) -> list[Array]:
    """RMS · sqrt(max(R, C)) · U Vᵀ of every matrix of every stack [L, ...], float32, each in its array's place.

    On a mesh each device does whole layers: stacks go from parts of every layer to every part of some layers by
    all-to-all, and back. Where devices hold the same part (`data`), they share its layers out and gather the results.
    """

    def all_of(*stacks: Array) -> list[Array]:
        return _orthogonalize(specs, stacks, steps, numerics, by_head)

    arrays = [array.astype(numerics.dtype) for array in arrays]  # as the products read them: less to move
    if mesh is None or mesh.size == 1:
        found = all_of(*arrays)
    else:
        parts = tuple(sharding(mesh, spec.shape, spec.axes, rules).spec for spec in specs)

        def spread(*local: Array) -> list[Array]:
            whole = [_whole_layers(x, part, mesh) for x, part in zip(local, parts, strict=True)]
            done = all_of(*whole)
            return [
                _parts_of_layers(x, part, mesh)[: like.shape[0]]
                for x, part, like in zip(done, parts, local, strict=True)
            ]

        # check_vma: it can't be seen from the types that what is gathered over `data` is the same everywhere
        found = jax.shard_map(spread, mesh=mesh, in_specs=parts, out_specs=list(parts), check_vma=False)(*arrays)
    return [x.astype(jnp.float32) for x in found]


def scale_by_muon(
    specs: Any,
    *,
    momentum: float,
    steps: Polynomials,
    numerics: Numerics,
    mesh: Mesh | None,
    rules: Rules = RULES,
    by_head: bool = False,
) -> optax.GradientTransformation:
    """Nesterov momentum, then `orthogonalize`, of a tree in which all leaves are declared as stacked matrices.

    Args:
      specs: the declaration; it may hold more than the tree.
      momentum: decay of the sum of gradients.
      by_head: whether query, key and value of each head are matrices by themselves, or of all heads together.
    """

    def update(updates: Any, _: Any) -> Any:
        leaves, tree = jax.tree.flatten_with_path(updates)
        declared = [_at(specs, path) for path, _ in leaves]
        arrays = [leaf for _, leaf in leaves]
        found = orthogonalize(declared, arrays, steps=steps, numerics=numerics, mesh=mesh, rules=rules, by_head=by_head)
        return jax.tree.unflatten(tree, found)

    return optax.chain(optax.trace(momentum, nesterov=True), optax.stateless(update))


def _orthogonalize(
    specs: Sequence[ParamSpec], stacks: Sequence[Array], steps: Polynomials, numerics: Numerics, by_head: bool
) -> list[Array]:
    """Of whole layers, however many there are of each."""
    by_shape: dict[tuple[int, int], list[tuple[int, int, bool]]] = {}  # -> (array, piece, turned)
    views = [_split(stack, spec, by_head) for stack, spec in zip(stacks, specs, strict=True)]
    for number, pieces in enumerate(views):
        for place, piece in enumerate(pieces):
            rows, columns = piece.shape[1:]
            by_shape.setdefault((min(rows, columns), max(rows, columns)), []).append((number, place, rows > columns))
    for (_, columns), members in by_shape.items():
        matrices = [_turn(views[number][place], turned) for number, place, turned in members]
        found_ZRC = newton_schulz(jnp.concatenate(matrices), steps=steps, numerics=numerics)
        found_ZRC = (RMS * math.sqrt(columns) * found_ZRC).astype(numerics.dtype)
        ends = list(accumulate(len(matrix) for matrix in matrices))
        for (number, place, turned), x in zip(members, jnp.split(found_ZRC, ends[:-1]), strict=True):
            views[number][place] = _turn(x, turned)
    return [_join(pieces, spec, len(stack)) for pieces, spec, stack in zip(views, specs, stacks, strict=True)]


def _split(stack: Array, spec: ParamSpec, by_head: bool) -> list[Array]:
    """The matrices of a stack [L, ...], of each piece [L, R, C] or, by head, [L heads, R, C]."""
    assert spec.axes[0] == "layers" and spec.inputs is not None, spec
    widths = spec.pieces or spec.shape[-1:]
    head = min(widths) if by_head and spec.axes[-2] in HEADS else None  # a piece may be several heads of queries wide
    rows = math.prod(spec.shape[1 : 1 + spec.inputs])
    pieces = jnp.split(stack, list(accumulate(widths))[:-1], axis=-1)
    if head is None:
        return [piece.reshape(len(stack), rows, -1) for piece in pieces]
    return [piece.reshape(len(stack), rows, -1, head).swapaxes(1, 2).reshape(-1, rows, head) for piece in pieces]


def _join(matrices: Sequence[Array], spec: ParamSpec, layers: int) -> Array:
    """The inverse of `_split`."""
    together = [x.reshape(layers, -1, *x.shape[1:]).swapaxes(1, 2) for x in matrices]  # [L, R, heads or 1, C]
    pieces = [x.reshape(layers, *spec.shape[1:-1], -1) for x in together]
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=-1)


def _turn(x_ZRC: Array, turned: bool) -> Array:
    return x_ZRC.swapaxes(1, 2) if turned else x_ZRC


def _whole_layers(x: Array, part: PartitionSpec, mesh: Mesh) -> Array:
    """A device's part of L layers to its whole layers, L over the number of devices, rounded up; the rest are zeros."""
    x = jnp.pad(x, ((0, -len(x) % mesh.size),) + ((0, 0),) * (x.ndim - 1))
    for axis, name in _splits(part, mesh):
        x = lax.all_to_all(x, name, split_axis=0, concat_axis=axis, tiled=True)
    for name in _copies(part, mesh):
        x = lax.dynamic_slice_in_dim(x, lax.axis_index(name) * (len(x) // mesh.shape[name]), len(x) // mesh.shape[name])
    return x


def _parts_of_layers(x: Array, part: PartitionSpec, mesh: Mesh) -> Array:
    """The inverse of `_whole_layers`, padding included."""
    for name in reversed(_copies(part, mesh)):
        x = lax.all_gather(x, name, axis=0, tiled=True)
    for axis, name in reversed(_splits(part, mesh)):
        x = lax.all_to_all(x, name, split_axis=axis, concat_axis=0, tiled=True)
    return x


def _splits(part: PartitionSpec, mesh: Mesh) -> list[tuple[int, str]]:
    """(axis of the array, mesh axis) of each split, but those over one device."""
    found = []
    for axis, names in enumerate(part):
        names = (names,) if isinstance(names, str) else names or ()
        # the first name is the outermost: it is put together last
        found += [(axis, name) for name in reversed(names) if mesh.shape[name] > 1]
    return found


def _copies(part: PartitionSpec, mesh: Mesh) -> list[str]:
    """The mesh axes along which devices hold the same part."""
    used = {name for _, name in _splits(part, mesh)}
    return [name for name in mesh.axis_names if name not in used and mesh.shape[name] > 1]


def _at(specs: Any, path: Any) -> ParamSpec:
    for key in path:
        specs = specs[key.key]
    return specs
