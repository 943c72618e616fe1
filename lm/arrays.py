"""Trees of arrays on disk: written in the background, read onto any devices. The only file that knows Orbax."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import InputError

_TIMEOUT_SECONDS = 3600
"""How long a save may take before it counts as failed."""


class ArrayWriter:
    """Writes one folder of items at a time. Every process makes the same calls; each writes its shards.

    `complete(folder)` runs in the background on the first process when all is written, while the folder still has a
    temporary name; after it, the folder gets the final one.
    """

    def __init__(self, complete: Callable[[Path], None]):
        ocp = _orbax()
        self._complete = complete
        self._destination: Path | None = None
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(),
            async_options=ocp.options.AsyncOptions(
                timeout_secs=_TIMEOUT_SECONDS, post_finalization_callback=self._written
            ),
        )

    def start(self, destination: Path, items: Mapping[str, Any]) -> None:
        """Starts writing each tree to `destination`/name. Returns once the arrays may be donated or overwritten.

        On an accelerator Orbax has copied them to the host by then. On a CPU it holds views of them: JAX donates no
        buffer that has one, it copies.
        """
        self.wait()
        ocp = _orbax()
        self._destination = destination.absolute()
        trees = {name: ocp.args.StandardSave(jax.tree.map(_as_array, tree)) for name, tree in items.items()}
        self._orbax.save(_epath(self._destination), args=ocp.args.Composite(**trees))

    def wait(self) -> None:
        """Blocks until nothing is being written; raises what went wrong."""
        self._orbax.wait_until_finished()

    def close(self) -> None:
        self._orbax.close()

    def _written(self) -> None:
        assert self._destination is not None
        self._complete(Path(self._orbax.get_temporary_path(_epath(self._destination)).get()))


def read_as(folder: Path, wanted: Any) -> Any:
    """Reads an item in the structure, layout and dtypes of `wanted`, a tree of jax.ShapeDtypeStruct.

    A leaf with a sharding becomes a jax.Array, one without a numpy array. Raises InputError where the saved arrays
    differ in structure, shape or dtype.
    """
    saved, asked = _described(_saved_tree(folder)), _described(wanted)
    different = [name for name in {**saved, **asked} if saved.get(name) != asked.get(name)]
    if different:
        lines = [f"\n  {name}: saved {saved.get(name, '-')}, wanted {asked.get(name, '-')}" for name in different[:5]]
        more = f"\n  and {len(different) - 5} more" if len(different) > 5 else ""
        raise InputError(f"{folder} holds other arrays than the config asks for:{''.join(lines)}{more}")
    return _read(folder, wanted)


def entries(folder: Path) -> set[str]:
    """The names at the top of a saved item."""
    return set(_saved_tree(folder))


def read_all(folder: Path, *, dtype: Any, shardings: Any = None) -> Any:
    """Reads a whole item; `dtype` (None: as saved) casts its floating-point leaves.

    `shardings` is a tree like the item: each process reads what its own devices hold. None: all on its first device.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def wanted(leaf: Any, place: jax.sharding.Sharding = here) -> jax.ShapeDtypeStruct:
        cast = dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(leaf.shape, dtype if cast else leaf.dtype, sharding=place)

    saved = _saved_tree(folder)
    return _read(folder, jax.tree.map(wanted, saved, *([] if shardings is None else [shardings])))


def _described(tree: Any) -> dict[str, str]:
    """What must agree, leaf by leaf: {path: "dtype[shape]"}."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _saved_tree(folder: Path) -> Any:
    """The saved structure, with shape and dtype of each leaf. Named tuples appear as dicts, tuples as lists."""
    if not folder.is_dir():
        raise InputError(f"{folder.parent} has no {folder.name!r} arrays")
    with contextlib.closing(_orbax().PyTreeCheckpointHandler()) as handler:
        return handler.metadata(_epath(folder.absolute())).tree


def _read(folder: Path, wanted: Any) -> Any:
    ocp = _orbax()

    def how(leaf: Any) -> Any:
        if leaf.sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
        return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)

    args = ocp.args.PyTreeRestore(item=wanted, restore_args=jax.tree.map(how, wanted))
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        return handler.restore(_epath(folder.absolute()), args=args)


def _as_array(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _epath(path: Path) -> Any:
    from etils import epath

    return epath.Path(path)


@functools.cache
def _orbax() -> Any:
    """Orbax, imported when first needed (0.4 s), its chatter silenced."""
    import orbax.checkpoint as ocp

    logging.getLogger("absl").addFilter(_is_news)
    return ocp


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of the log is shown. Of Orbax's only errors, without those that it raises as well: it logs their
    traceback."""
    told = record.levelno >= logging.ERROR and not record.exc_info
    return told or "orbax" not in Path(record.pathname).parts
