"""Checkpoints that describe themselves, written in the background, opened on any machine.

    RUN/config.json, RUN/tokenizer.json (SentencePiece: tokenizer.model), RUN/source_tokenizer.* of an encoder's own
    RUN/checkpoints/STEP/{params/, opt_state/, rest/, config.json, tokenizer.*, manifest.json}

`params` are the weights for readers: where a run averages them (`training.ema_decay`) the averaged ones, beside which
raw_params/ has those that training goes on from.
The arrays are written into a folder with a temporary name. The manifest is the last file put there, then the folder
gets its final name: killed at any moment, a step is whole or it doesn't exist. Loading never executes code from the
file.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lm import arrays
from lm.config import InputError, RunConfig
from lm.manifest import MANIFEST, Manifest, add_metrics, read_manifest, sync, verify, write_atomically, write_manifest
from lm.nn.language_model import model_specs
from lm.nn.source import Source
from lm.parallel import RULES, Rules, parameter_shardings
from lm.processes import hosts
from lm.run_directory import (
    BEST,
    CHECKPOINTS,
    CONFIG,
    SOURCE,
    TOKENIZERS,
    best_step,
    is_step,
    latest_step,
    listed,
    locate,
    read_config,
    step_path,
    steps,
)

if TYPE_CHECKING:
    from lm.data.tokenizer import Tokenizer
    from lm.model import LM

__all__ = ["BEST", "CheckpointWriter", "Loaded", "Manifest", "best_step", "latest_step", "load", "locate"]
__all__ += ["entries", "load_tokenizers", "read_config", "read_manifest", "restore", "restore_params"]
__all__ += ["save_tokenizers", "steps", "verify", "write"]

APPEARS_SECONDS = 60.0
"""For what one process has written to be seen by the others; NFS keeps for half a minute that a file isn't there."""
_LEFTOVER = re.compile(r"\d+\.(orbax-checkpoint-tmp.*|deleting)")


class CheckpointWriter:
    """Saves checkpoints of a run in the background, and keeps the newest few and the best.

    Every process of a run makes one and the same calls to it: each writes its shards of the arrays, the first the rest.

    Args:
        workdir: the run directory; made if needed. What an earlier process left unfinished in it is removed.
        config: the run's config.
        save_tokenizer: writes the tokenizer's file, or those of both, into the folder it gets (`Tokenizer.save`,
            `save_tokenizers`); None: no tokenizer.
        provenance: where the run comes from: checksums of data and tokenizer, versions.
        keep: how many of the newest checkpoints to keep, besides the best; None keeps all.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        config: RunConfig,
        save_tokenizer: Callable[[Path], object] | None,
        provenance: Mapping[str, str],
        keep: int | None,
    ):
        assert keep is None or keep >= 1, keep
        self._run = Path(workdir).absolute()
        self._folder = self._run / CHECKPOINTS
        self._keep = keep
        self._provenance = dict(provenance)
        self._files: dict[str, bytes] = {CONFIG: config.to_json().encode()}
        self._saving: dict[str, Any] = {}
        self._first = jax.process_index() == 0
        if self._first:
            self._prepare_run(save_tokenizer)
        hosts.barrier("the run directory")
        if not _appears(self._run / CONFIG):
            raise InputError(
                f"{workdir}, where process 0 has begun the run, holds none for process {hosts.index()}: name a "
                "--workdir on a file system that all machines share"
            )
        self._arrays = arrays.ArrayWriter(self._complete)

    def save(self, step: int, items: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> None:
        """Starts saving `items` (params, opt_state, rest: trees of arrays) as they are now.

        Returns once the arrays may be donated or overwritten. Waits for the save before, and raises what went wrong in
        it. A step that exists is not written again; metrics that it lacks are added.
        """
        self.wait()
        destination = step_path(self._run, step)
        if is_step(destination):
            if self._first:
                add_metrics(destination, metrics or {})
            return
        if destination.exists():
            raise InputError(
                f"{destination} is in the way: it has no valid {MANIFEST}, so it is not a checkpoint. Move it"
            )
        self._saving = {"step": step, "metrics": dict(metrics or {})}
        self._arrays.start(destination, items)

    def wait(self) -> None:
        """Blocks until the last save is complete, deletes what it makes superfluous; raises what went wrong in it."""
        self._arrays.wait()
        if self._saving:
            hosts.barrier("the checkpoint", hosts.LONG)  # when all have written, the first computes checksums
            self._saving = {}
            self._prune()

    def close(self) -> None:
        """Waits, then frees the background threads. The writer can't be used again."""
        try:
            self.wait()
        finally:
            self._arrays.close()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is not None and hosts.count() > 1:
            self._saving = {}  # the others may know nothing of the error, and never come to wait for this save
        self.close()

    def _prepare_run(self, save_tokenizer: Callable[[Path], object] | None) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for entry in self._folder.iterdir():
            if _LEFTOVER.fullmatch(entry.name):
                shutil.rmtree(entry)
        if save_tokenizer is not None:
            with tempfile.TemporaryDirectory() as folder:
                save_tokenizer(Path(folder))
                self._files |= {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        for name, content in self._files.items():
            write_atomically(self._run / name, content)

    def _complete(self, unfinished: Path) -> None:
        """Runs in the background on the first process, when all arrays of all processes are written."""
        for name, content in self._files.items():
            (unfinished / name).write_bytes(content)
        write_manifest(unfinished, **self._saving, provenance=self._provenance)

    def _prune(self) -> None:
        """Deletes all but the newest and the best, after the newest is known to be on the disk."""
        if self._keep is None or not self._first:
            return
        sync(self._folder)
        present = steps(self._run)
        for step in set(present[: -self._keep]) - {best_step(self._run)}:
            # renamed first, so that a half-deleted checkpoint is never taken for a whole one
            doomed = step_path(self._run, step).rename(self._folder / f"{step}.deleting")
            shutil.rmtree(doomed)


def _appears(file: Path) -> bool:
    """Whether a file that another process has written is there; a network's file system may show it late."""
    until = time.monotonic() + APPEARS_SECONDS
    while not file.is_file() and time.monotonic() < until:
        time.sleep(0.5)
    return file.is_file()


def restore(checkpoint: str | Path, items: Mapping[str, Any]) -> dict[str, Any]:
    """Reads items of a checkpoint, bit for bit, in the structure of `items`: trees of jax.ShapeDtypeStruct.

    A leaf with a sharding becomes a jax.Array so laid out, whatever the layout and the devices it was written from; one
    without becomes a numpy array. Raises InputError, naming the leaves, where structure, shape or dtype differ, and,
    naming the files, where their checksums do.
    """
    everywhere = any(_over_processes(leaf.sharding) for leaf in jax.tree.leaves(items))
    _check(checkpoint, *items, together=everywhere)
    return {name: arrays.read_as(Path(checkpoint) / name, wanted) for name, wanted in items.items()}


def entries(checkpoint: str | Path, item: str) -> set[str]:
    """The names at the top of an item. Raises InputError where the checksums of its files differ."""
    _check(checkpoint, item)
    return arrays.entries(Path(checkpoint) / item)


def restore_params(checkpoint: str | Path, *, dtype: Any = None, shardings: Any = None) -> dict[str, Any]:
    """The parameters of a checkpoint as a nested dict of jax arrays, laid out by a tree of shardings like it.

    `dtype` casts floating-point leaves as they are read; None leaves them as saved. `shardings` None: on this process's
    first device.
    """
    _check(checkpoint, "params", together=any(map(_over_processes, jax.tree.leaves(shardings))))
    return arrays.read_all(Path(checkpoint) / "params", dtype=dtype, shardings=shardings)


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
    """A trained model, opened: `loaded(tokens_BT)` gives logits. `step` and `path` say which checkpoint it is.

    `params` are the weights that the run was evaluated with: their moving average where `training.ema_decay` is set.
    `step` is None, and `path` its folder, for one that isn't ours. `source_tokenizer` is the encoder's own; None: there
    is no encoder, or it uses the same as the decoder.
    """

    config: RunConfig
    params: dict[str, Any]
    tokenizer: Tokenizer | None
    step: int | None
    path: Path
    source_tokenizer: Tokenizer | None = None

    @functools.cached_property
    def model(self) -> LM:
        """The Flax module: `model.apply({"params": params}, tokens_BT)`."""
        from lm.model import LM

        return LM(self.config.model)

    def __call__(self, tokens_BT: Any, *, source: Any = None) -> jax.Array:
        """The compiled forward pass: logits_BTV of every position.

        Args:
          source: what the encoder of an encoder–decoder reads: a Source, or source_BS, one source a row, EOS included.
        """
        if source is not None and not isinstance(source, Source):
            tokens_BS = jnp.asarray(source)
            positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape)
            source = Source(tokens_BS, jnp.ones_like(tokens_BS), positions_BS)
        return self._forward(self.params, jnp.asarray(tokens_BT), source)

    @property
    def num_parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    @functools.cached_property
    def _forward(self) -> Callable[[Any, jax.Array, Source | None], jax.Array]:
        return jax.jit(lambda params, tokens, source: self.model.apply({"params": params}, tokens, source=source))


def load(
    path: str | Path,
    *,
    step: str | int = "latest",
    dtype: Any = None,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
) -> Loaded:
    """Opens a run directory or one checkpoint: config, parameters and tokenizer, with nothing but the path.

    The parameters lie on this process's first device. With a `mesh` they lie on it by the `rules`, whatever they were
    written from, and each process reads its own part: no device and no host need hold all of them.
    """
    checkpoint = locate(path, step)
    if mesh is not None and mesh.is_multi_process:  # a run that goes on has a new latest one at any moment
        checkpoint = locate(path, hosts.agree("the step to open", str(read_manifest(checkpoint).step)))
    _check(checkpoint, CONFIG)
    tokenizer, source_tokenizer = load_tokenizers(checkpoint)
    config = read_config(checkpoint)
    shardings = None if mesh is None else parameter_shardings(mesh, model_specs(config.model), rules)
    params = restore_params(checkpoint, dtype=dtype, shardings=shardings)
    return Loaded(config, params, tokenizer, read_manifest(checkpoint).step, checkpoint, source_tokenizer)


def load_tokenizers(checkpoint: Path) -> tuple[Tokenizer | None, Tokenizer | None]:
    """The tokenizer of a checkpoint and the encoder's own, as far as there are such."""
    named = [[f"{prefix}{name}" for name in TOKENIZERS] for prefix in ("", SOURCE)]
    _check(checkpoint, *named[0], *named[1])
    found = [next((checkpoint / name for name in names if (checkpoint / name).is_file()), None) for names in named]
    if not any(found):
        return None, None
    from lm.data import tokenizer as tokenizers

    own, source = (None if path is None else tokenizers.load(path) for path in found)
    return own, source


def save_tokenizers(folder: Path, tokenizer: Tokenizer, source_tokenizer: Tokenizer | None) -> None:
    """Writes the files that `load_tokenizers` reads."""
    tokenizer.save(folder)
    if source_tokenizer is not None:
        source_tokenizer.save(folder / f"{SOURCE}{source_tokenizer.file_name}")


def write(run: Loaded, workdir: str | Path, *, provenance: Mapping[str, str]) -> Path:
    """Writes an opened model as a run directory of one checkpoint, of parameters alone; returns the checkpoint.

    It opens, scores, generates and is a start for training, but has no optimizer state to be continued from. Raises
    InputError where `workdir` is there and not an empty folder.
    """
    workdir, step = Path(workdir), run.step or 0
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise InputError(f"{workdir} is there and not an empty folder: name a new one")
    save_tokenizer, digests = None, {}
    if run.tokenizer is not None:
        own, source = run.tokenizer, run.source_tokenizer
        save_tokenizer = functools.partial(save_tokenizers, tokenizer=own, source_tokenizer=source)
        digests = {"tokenizer_sha256": own.sha256}
        if source is not None:
            digests["source_tokenizer_sha256"] = source.sha256
    with CheckpointWriter(
        workdir, config=run.config, save_tokenizer=save_tokenizer, provenance={**digests, **provenance}, keep=None
    ) as writer:
        writer.save(step, {"params": run.params})
    return step_path(workdir, step)


def _check(checkpoint: str | Path, *parts: str, together: bool = False) -> None:
    """Compares checksums before anything is read: a changed byte in an array would otherwise pass for a number.

    All processes `together` look at each file once, and none goes on before all have found theirs in order.
    """
    share = (hosts.index(), hosts.count()) if together else (0, 1)
    if problems := verify(checkpoint, parts, share):
        raise InputError(f"{checkpoint} is damaged: {listed(problems)}. Use another checkpoint of the run")
    if together:
        hosts.barrier(f"the checksums of {Path(checkpoint).name}", hosts.LONG)


def _over_processes(sharding: Any) -> bool:
    return sharding is not None and not sharding.is_fully_addressable
