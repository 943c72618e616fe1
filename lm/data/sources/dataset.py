"""TFDS datasets -> documents, through `as_data_source` on ArrayRecord: no TensorFlow."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from absl import logging as absl_logging
from tensorflow_datasets.core.download import downloader

from lm.config import InputError
from lm.data import cache
from lm.data.sources import document, files
from lm.data.sources.document import Document
from lm.data.sources.files import File
from lm.data.sources.reader import Reader, Reading
from lm.data.sources.source import Source
from lm.fields import nearest

READ_RECORDS = 128
"""Records read at once."""
DOWNLOAD_RETRIES = 4
"""Of TFDS's ten, which take minutes to find that there is no network. Four take three seconds."""


@dataclasses.dataclass(frozen=True)
class Dataset(Reader):
    """Text features of one split of a dataset that is prepared. Ids are `SPLIT#INDEX`, or the values of `id_feature`.

    Attributes:
        directory: where it lies.
        split: one of its own or a slice of them.
        features: one, or the two sides of a pair; `a.b` is the feature b inside a.
    """

    directory: str
    split: str
    features: tuple[str, ...]
    pair_separator: str = ""
    id_feature: str | None = None

    @property
    def splits(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self._builder.info.splits)

    @property
    def size(self) -> int:
        return sum(file.size for file in self._files())

    def of_split(self, split: str) -> Dataset:
        """Raises InputError where there is no such split."""
        changed = dataclasses.replace(self, split=split)
        changed._records()
        return changed

    def contents(self) -> list[Any]:
        how = [self.split, self.features, self.pair_separator, self.id_feature]
        return ["Dataset", how, [[file.id, files.digest(file)] for file in self._files()]]

    def scan(self) -> Iterator[tuple[Document, int]]:
        records, size = self._records(), self.size
        for start in range(0, len(records), READ_RECORDS):
            indices = range(start, min(start + READ_RECORDS, len(records)))
            for index, record in zip(indices, records.__getitems__(indices), strict=True):
                sides = [self._text(record, feature, index) for feature in self.features]
                name = self._text(record, self.id_feature, index) if self.id_feature else f"{self.split}#{index}"
                position = size * (index + 1) // len(records)
                place = f"{self._builder.info.full_name}, split {self.split}, record {index}"
                yield document.of_sides(name, sides, self.pair_separator, place=place), position

    @functools.cached_property
    def _builder(self) -> tfds.core.DatasetBuilder:
        with quiet():
            return tfds.builder_from_directory(self.directory)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def _files(self) -> list[File]:
        """The files that hold the split, each once."""
        paths = dict.fromkeys(map(str, self._builder.info.splits[self.split].filepaths))
        return [File(Path(path).name, path, Path(path).stat().st_size) for path in paths]

    def _records(self) -> Any:
        info = self._builder.info
        name, splits = info.full_name, list(info.splits)
        base = re.match(r"\w*", self.split)
        if base is None or base[0] not in splits:
            raise InputError(
                f"{name} has no split {self.split!r}{nearest(self.split, splits)}: it has {', '.join(splits)}"
            )
        try:
            return self._builder.as_data_source(self.split)
        except NotImplementedError as error:
            raise InputError(
                f"{name} in {self.directory} is stored as {info.file_format.value}, which needs TensorFlow: "
                "prepare it again with --file_format=array_record"
            ) from error
        except ValueError as error:
            raise InputError(f"{name} has no split {self.split!r} ({error}): it has {', '.join(splits)}") from error

    def _text(self, record: Any, feature: str, index: int) -> str:
        for part in feature.split("."):
            record = record[part]
        try:
            return record.decode("utf-8")
        except UnicodeDecodeError as error:
            place = f"{self._builder.info.full_name}, split {self.split}, record {index}"
            raise InputError(f"{place} is not UTF-8 at byte {error.start}") from error


def reader(source: Source, reading: Reading) -> Dataset:
    builder = named(source.place, source.fields)
    pair_separator = reading.pair_separator if len(source.fields) == 2 else ""
    features = _text_features(builder, source.fields)
    return Dataset(str(builder.data_path), "train", features, pair_separator).of_split(source.split or "train")


def named(name: str, features: tuple[str, ...] = ()) -> tfds.core.DatasetBuilder:
    """The dataset NAME[/CONFIG][@VERSION], prepared: from our cache, from TFDS's own folder, or now.

    The text features are looked up first, so that nothing is downloaded in vain.
    """
    _import_texts()
    builders = [_builder(name, folder) for folder in (cache.directory("tfds"), _tfds_folder())]
    known = [builder for builder in builders if builder is not None]
    if not known:
        names = tfds.list_builders(with_community_datasets=False)
        raise InputError(f"TFDS has no dataset {name!r}{nearest(name.split('/')[0], names)}")
    there = [builder for builder in known if builder.data_path.exists()]
    builder = (there or known)[0]
    _text_features(builder, features)
    return builder if there else prepare(builder)


def prepare(builder: tfds.core.DatasetBuilder) -> tfds.core.DatasetBuilder:
    """Builds a dataset as ArrayRecord, unless another process has done it by the time that its lock is to be had.

    TFDS does it in a folder of its own and renames that, so a kill does no harm.
    """
    name = hashlib.sha256(str(builder.data_path).encode()).hexdigest()[:32]
    with cache.locked(cache.directory("tfds") / f".{name}.lock"):
        if builder.data_path.exists():
            builder.info.read_from_directory(builder.data_dir)
            return builder
        return _prepare(builder)


def _prepare(builder: tfds.core.DatasetBuilder) -> tfds.core.DatasetBuilder:
    settings = tfds.download.DownloadConfig(try_download_gcs=False)
    downloader.MAX_RETRIES = DOWNLOAD_RETRIES
    remedy = f"prepare it where it can be, with --file_format=array_record, and copy it to {builder.data_dir_root}"
    try:
        with quiet():
            builder.download_and_prepare(file_format="array_record", download_config=settings)
    except ImportError as error:
        raise InputError(
            f"TFDS can't prepare {builder.info.full_name} without {error.name}, which is not installed: {remedy}"
        ) from error
    except (OSError, AssertionError, tfds.download.DownloadError) as error:
        # Another process may have finished the same build first: then its folder is in the way of the rename.
        if not builder.data_path.exists():
            raise InputError(f"TFDS can't prepare {builder.info.full_name} ({error}): {remedy}") from error
        builder.info.read_from_directory(builder.data_dir)
    return builder


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps TFDS's bars, prints and warnings off the terminal."""
    tfds.disable_progress_bar()
    level, retries = absl_logging.get_verbosity(), logging.getLogger("urllib3")
    retries_level = retries.level
    absl_logging.set_verbosity(absl_logging.ERROR)
    retries.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl_logging.set_verbosity(level)
        retries.setLevel(retries_level)


def _text_features(builder: tfds.core.DatasetBuilder, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """The features to read: those asked for, else `text`, else the only text there is."""
    features = dict(_flat(builder.info.features))
    texts = [name for name, feature in features.items() if isinstance(feature, tfds.features.Text)]
    name = builder.info.full_name
    for one in wanted:
        if one not in texts:
            raise InputError(f"{name} has no text feature {one!r}{nearest(one, texts)}: it has {_listed(texts)}")
    if wanted:
        return wanted
    if "text" not in texts and len(texts) != 1:
        if not texts:
            raise InputError(f"{name} has no text: its features are {_listed(list(features))}")
        raise InputError(
            f"{name} has several texts, {_listed(texts)}: choose one, as in #{texts[0]} at the end of the source"
        )
    return ("text",) if "text" in texts else (texts[0],)


def _flat(features: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The features by name, those inside others as a.b; the languages of a translation are such."""
    for name, feature in features.items() if isinstance(features, tfds.features.FeaturesDict) else ():
        if isinstance(feature, tfds.features.FeaturesDict):
            yield from _flat(feature, f"{prefix}{name}.")
        else:
            yield prefix + name, feature


def _import_texts() -> None:
    """Makes TFDS's older datasets of text known. It does so itself only up to the first that needs TensorFlow, of
    whatever kind, and then doesn't know those of translation."""
    for room in ("question_answering", "summarization", "text", "text_simplification", "translate"):
        with contextlib.suppress(ImportError):
            importlib.import_module(f"tensorflow_datasets.{room}")


def _builder(name: str, folder: Path) -> tfds.core.DatasetBuilder | None:
    """The builder for a dataset in a folder, or None where nobody knows it."""
    try:
        with quiet():
            return tfds.builder(name.replace("@", ":"), data_dir=str(folder), try_gcs=False)
    except tfds.core.DatasetNotFoundError:
        return None
    except (ValueError, AssertionError) as error:  # its config or its version
        reason = str(error).splitlines()[0].rpartition('}": ')[2]  # TFDS puts the arguments before it
        raise InputError(f"tfds:{name}: {reason}") from error


def _tfds_folder() -> Path:
    """Where TFDS itself keeps datasets: $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    return Path(tfds.core.constants.DATA_DIR).expanduser()


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"
