"""The manifest of a checkpoint: what it consists of, with checksums. A checkpoint without a valid one doesn't exist."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from lm.config import InputError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
_UNLISTED = {"_CHECKPOINT_METADATA", "commit_success.txt"}
"""Orbax's own notes, which it changes after the manifest is complete and which no reader needs."""


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """Size and checksum of one file of a checkpoint."""

    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself: its files by relative path, the metrics of its step, where it came from."""

    step: int
    files: dict[str, FileRecord]
    metrics: dict[str, float]
    provenance: dict[str, str]


def write_manifest(
    checkpoint: Path, *, step: int, metrics: Mapping[str, float], provenance: Mapping[str, str]
) -> Manifest:
    """Describes the files that `checkpoint` holds. Every one is on the disk, not in a cache, before the manifest is."""
    inside = sorted(checkpoint.rglob("*"))
    names = [path.relative_to(checkpoint).as_posix() for path in inside if path.is_file()]
    files = {name: _record(checkpoint / name) for name in names if name not in _UNLISTED}
    for folder in (checkpoint, *(path for path in inside if path.is_dir())):
        sync(folder)
    manifest = Manifest(step, files, {name: float(value) for name, value in metrics.items()}, dict(provenance))
    _write(checkpoint, manifest)
    return manifest


def fingerprint(manifest: Manifest, item: str) -> str:
    """One checksum over the files of one item: it names these very arrays."""
    listed = sorted((name, record.sha256) for name, record in manifest.files.items() if name.startswith(f"{item}/"))
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def add_metrics(checkpoint: Path, metrics: Mapping[str, float]) -> None:
    """Adds metrics that were measured after the checkpoint was written."""
    manifest = read_manifest(checkpoint)
    merged = {**manifest.metrics, **{name: float(value) for name, value in metrics.items()}}
    if merged != manifest.metrics:
        _write(checkpoint, dataclasses.replace(manifest, metrics=merged))


def read_manifest(checkpoint: str | Path) -> Manifest:
    """The manifest of a checkpoint. Raises InputError where there is none or it can't be read."""
    path = Path(checkpoint) / MANIFEST
    try:
        return _parse(path)
    except FileNotFoundError as error:
        raise InputError(f"{checkpoint} has no {MANIFEST}: it is not a complete checkpoint") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} can't be read ({error}): use another checkpoint of the run") from error


def verify(checkpoint: str | Path, parts: Collection[str] | None = None, share: tuple[int, int] = (0, 1)) -> list[str]:
    """Compares files with the manifest: the problems, one line each; empty when all is well.

    `parts` are the items and top-level files to look at; None takes all. `share` (i, n) takes every n-th of them from
    the i-th on: of n that share the work each has its own.
    """
    checkpoint = Path(checkpoint)
    try:
        manifest = read_manifest(checkpoint)
    except InputError as error:
        return [str(error)]
    problems = []
    if _checksum(_content(manifest)) != json.loads((checkpoint / MANIFEST).read_text()).get("sha256"):
        problems.append(f"{MANIFEST}: changed since it was written (its own checksum differs)")
    wanted = [name for name in sorted(manifest.files) if parts is None or name.split("/")[0] in parts]
    for name in wanted[share[0] :: share[1]]:
        path, expected = checkpoint / name, manifest.files[name]
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != expected.bytes:
            problems.append(f"{name}: {path.stat().st_size} bytes, the manifest says {expected.bytes}")
        elif _hash(path) != expected.sha256:
            problems.append(f"{name}: changed since it was written (sha256 differs)")
    return problems


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a file at once: a reader, or a process killed at any moment, leaves the old or the new content."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sync(path: Path) -> None:
    """Makes a file's content, or the names in a folder, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(checkpoint: Path, manifest: Manifest) -> None:
    content = _content(manifest)
    write_atomically(
        checkpoint / MANIFEST, json.dumps({**content, "sha256": _checksum(content)}, indent=2, sort_keys=True) + "\n"
    )


def _parse(path: Path) -> Manifest:
    values = json.loads(path.read_text())
    if values["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema_version {values['schema_version']!r}, this version of lm reads {SCHEMA_VERSION}")
    files = {
        str(name): FileRecord(int(entry["bytes"]), str(entry["sha256"])) for name, entry in values["files"].items()
    }
    metrics = {str(name): math.nan if value is None else float(value) for name, value in values["metrics"].items()}
    return Manifest(int(values["step"]), files, metrics, dict(values["provenance"]))


def _content(manifest: Manifest) -> dict[str, object]:
    # JSON has no NaN: a metric that diverged is null
    metrics = {name: value if math.isfinite(value) else None for name, value in manifest.metrics.items()}
    return {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(manifest), "metrics": metrics}


def _checksum(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _record(path: Path) -> FileRecord:
    sync(path)
    return FileRecord(path.stat().st_size, _hash(path))


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
