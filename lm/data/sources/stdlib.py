"""`builtin:python-stdlib`: the source of the running interpreter's standard library, as a TFDS dataset.

Real text of about 12 MB on every machine, without a download. It differs by interpreter, and TFDS serves an old build
of the same name for ever: so the config's name carries the Python version and a hash of the files.
"""

from __future__ import annotations

import hashlib
import io
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from platform import python_version

import tensorflow_datasets as tfds

from lm.config import InputError
from lm.data import cache
from lm.data.sources import dataset
from lm.data.sources.holdout import held_out
from lm.data.sources.reader import Reading
from lm.data.sources.source import Source

NOT_SOURCE = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled", "_vendor", "__pycache__")
)
"""Folders left out wherever they are: tests, installed packages, vendored code."""


class PythonStdlib(tfds.core.GeneratorBasedBuilder):
    """One document a file, in the order of their paths; validation is a fixed tenth of the files."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First form."}
    # Without one TFDS looks for metadata of ours in the package around this file.
    pkg_dir_path = tfds.core.Path(__file__).parent
    # TFDS's own search for it needs a package (importlib_resources) that TFDS doesn't depend on.
    code_path = tfds.core.Path(__file__)

    def __init__(self, *, files: dict[str, str], data_dir: str):
        self._files = files
        config = tfds.core.BuilderConfig(name=f"py{python_version()}-{_digest(files)[:12]}")
        super().__init__(data_dir=data_dir, config=config)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="The Python standard library's own source.",
            features=tfds.features.FeaturesDict({"path": tfds.features.Text(), "text": tfds.features.Text()}),
            disable_shuffling=True,  # records stay in the order of their keys
        )

    def _split_generators(self, dl_manager: object) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
        held = held_out(list(self._files))
        return {
            "train": self._generate_examples([path for path in self._files if path not in held]),
            "validation": self._generate_examples([path for path in self._files if path in held]),
        }

    def _generate_examples(self, paths: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
        for key, path in enumerate(paths):
            yield key, {"path": path, "text": self._files[path]}


def reader(source: Source, reading: Reading) -> dataset.Dataset:
    return documents(prepared(), source.split or "train")


def documents(builder: tfds.core.DatasetBuilder, split: str) -> dataset.Dataset:
    """One split; the ids are the paths."""
    return dataset.Dataset(str(builder.data_path), "train", ("text",), id_feature="path").of_split(split)


def prepared(root: Path | None = None) -> tfds.core.DatasetBuilder:
    """The dataset, built into the cache unless it is there; without a `root`, of the interpreter's own library."""
    root = root or Path(sysconfig.get_path("stdlib"))
    files = source_files(root)
    if len(files) < 2:
        raise InputError(f"builtin:python-stdlib: {root} holds {len(files)} Python source files: use text:GLOB instead")
    with dataset.quiet():
        builder = PythonStdlib(files=files, data_dir=str(cache.directory("tfds")))
    return builder if builder.data_path.exists() else dataset.prepare(builder)


def source_files(root: Path) -> dict[str, str]:
    """Every Python file below `root` with text, by its relative path, in order.

    Each is decoded by the encoding it declares (PEP 263); one that can't be is left out, every time.
    """
    files = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in NOT_SOURCE]
        for name in names:
            path = Path(folder, name)
            if path.suffix == ".py" and (text := _decoded(path)):
                files[path.relative_to(root).as_posix()] = text
    return dict(sorted(files.items()))


def _decoded(path: Path) -> str | None:
    data = path.read_bytes()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return data.decode(encoding)
    except (SyntaxError, UnicodeDecodeError):
        return None


def _digest(files: dict[str, str]) -> str:
    """Of the files and of which are held out: TFDS serves a build of the same name for ever."""
    digest, held = hashlib.sha256(), held_out(list(files))
    for path, text in files.items():
        digest.update(f"{path}\0{path in held}\0{len(text)}\0{text}".encode())
    return digest.hexdigest()
