"""TFDS datasets -> documents, through `as_data_source` on ArrayRecord: random access, and no TensorFlow."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import tensorflow_datasets as tfds
from absl import logging

from lm.config import InputError, nearest
from lm.data import cache


def named(name: str, feature: str = "") -> tfds.core.DatasetBuilder:
    """The dataset NAME[/CONFIG][@VERSION], prepared: from our cache, from TFDS's own folder, or now.

    The text feature is looked up first, so that nothing is downloaded in vain.
    """
    builders = [_builder(name, folder) for folder in (cache.directory("tfds"), _tfds_folder())]
    known = [builder for builder in builders if builder is not None]
    if not known:
        names = tfds.list_builders(with_community_datasets=False)
        raise InputError(f"TFDS has no dataset {name!r}{nearest(name.split('/')[0], names)}")
    there = [builder for builder in known if builder.data_path.exists()]
    builder = (there or known)[0]
    _text_feature(builder, feature or None)
    return builder if there else prepare(builder)


def prepare(builder: tfds.core.DatasetBuilder) -> tfds.core.DatasetBuilder:
    """Builds a dataset as ArrayRecord. TFDS does it in a folder of its own and renames that, so a kill does no harm."""
    settings = tfds.download.DownloadConfig(try_download_gcs=False)
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
    level = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)


def documents(
    builder: tfds.core.DatasetBuilder, split: str, feature: str | None = None, *, id_feature: str | None = None
) -> tuple[list[str], Callable[[int], str]]:
    """The ids of a split's documents and how to read one. Ids are `SPLIT#INDEX`, or the values of `id_feature`."""
    name, splits = builder.info.full_name, list(builder.info.splits)
    base = re.match(r"\w*", split)
    if base is None or base[0] not in splits:
        raise InputError(f"{name} has no split {split!r}{nearest(split, splits)}: it has {', '.join(splits)}")
    feature = _text_feature(builder, feature)
    try:
        records = builder.as_data_source(split)
    except NotImplementedError as error:
        raise InputError(
            f"{name} in {builder.data_dir} is stored as {builder.info.file_format.value}, which needs TensorFlow: "
            "prepare it again with --file_format=array_record"
        ) from error
    except ValueError as error:
        raise InputError(f"{name} has no split {split!r} ({error}): it has {', '.join(splits)}") from error

    def read(index: int) -> str:
        try:
            return records[index][feature].decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{name}, split {split}, record {index} is not UTF-8 at byte {error.start}") from error

    if id_feature is None:
        return [f"{split}#{index}" for index in range(len(records))], read
    return [record[id_feature].decode("utf-8") for record in records], read


def _text_feature(builder: tfds.core.DatasetBuilder, wanted: str | None) -> str:
    """The feature to read: the one asked for, else `text`, else the only text there is."""
    features = dict(builder.info.features.items()) if hasattr(builder.info.features, "items") else {}
    texts = [name for name, feature in features.items() if isinstance(feature, tfds.features.Text)]
    name = builder.info.full_name
    if wanted is not None and wanted not in texts:
        raise InputError(f"{name} has no text feature {wanted!r}{nearest(wanted, texts)}: it has {_listed(texts)}")
    if wanted is None and "text" not in texts and len(texts) != 1:
        if not texts:
            raise InputError(f"{name} has no text: its features are {_listed(list(features))}")
        raise InputError(
            f"{name} has several texts, {_listed(texts)}: choose one, as in #{texts[0]} at the end of the source"
        )
    return wanted or ("text" if "text" in texts else texts[0])


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
