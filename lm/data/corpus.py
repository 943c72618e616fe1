"""Where documents come from: a source of text, with its split, as a sequence of documents with stable ids and order.

    builtin:python-stdlib      tfds:NAME[/CONFIG][@VERSION][#FEATURE]      text:GLOB

A source may end in a split. `SOURCE[train]` and `SOURCE[validation]` are the two corpora that `open_splits(SOURCE,
None)` gives; other splits and slices are TFDS's own, as in `tfds:ag_news_subset[test[:10%]]`. Without a split, `text:`
is all the text, and a dataset its train split.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from lm.config import InputError, nearest
from lm.data import holdout, text

KINDS = ("builtin", "tfds", "text")
BUILTINS = ("python-stdlib",)
OWN_VALIDATION = ("validation", "valid", "val", "dev", "test")
"""Splits of a dataset that serve as validation, best first."""


class Document(NamedTuple):
    """A text and the name it keeps."""

    id: str
    text: str


class Corpus(Sequence[Document]):
    """Documents in a stable order, read when asked for. `source` opens the same corpus again."""

    def __init__(self, source: str, ids: Sequence[str], read: Callable[[int], str]):
        if not ids:
            raise InputError(f"{source} has no documents")
        self.source, self.ids, self._read = source, ids, read

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return Document(self.ids[index], self._read(index))

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the ids and texts, so that a changed file is a changed corpus. Reads the corpus once."""
        digest = hashlib.sha256()
        for name, content in self:
            for part in (name.encode(), content.encode()):
                digest.update(len(part).to_bytes(8, "big") + part)
        return digest.hexdigest()


def open_corpus(source: str, *, document_separator: str | None = None) -> Corpus:
    """The documents of a source.

    Args:
        source: what to read, see above.
        document_separator: splits each text file into documents. None: one document a file.

    Raises:
        InputError: an unknown source or split, no matching file, no text, text that isn't UTF-8, or a dataset that
            isn't there and can't be prepared.
    """
    base, split = _parse(source)
    if split in ("train", "validation"):
        return open_splits(base, None, document_separator=document_separator)[split == "validation"]
    return _open(base, split, document_separator, _dataset(base))


def open_splits(train: str, validation: str | None, *, document_separator: str | None = None) -> tuple[Corpus, Corpus]:
    """The documents to train on and those to validate on.

    With no validation source: the dataset's own validation or test split; else a part held out of the training text,
    which training then doesn't see: the last tenth of a single document, by characters; of several documents those
    whose id hashes into a tenth.
    """
    if validation is not None:
        return (
            open_corpus(train, document_separator=document_separator),
            open_corpus(validation, document_separator=document_separator),
        )
    base, split = _parse(train)
    builder = _dataset(base)
    if own := _own_validation(builder):
        if split and own in re.findall(r"[A-Za-z_]\w*", split):
            raise InputError(f"{train} would be both trained and validated on: name another source in data.validation")
        return (
            _open(base, split or "train", document_separator, builder),
            _open(base, own, document_separator, builder),
        )
    if split not in (None, "train"):
        raise InputError(f"nothing says what to validate on beside {train}: name a source in data.validation")
    return _hold_out(_open(base, None, document_separator, builder))


def _parse(source: str) -> tuple[str, str | None]:
    """SOURCE[SPLIT] -> (SOURCE, SPLIT or None), with the kind checked."""
    kind, colon, rest = source.partition(":")
    if not colon or kind not in KINDS:
        example = f", or text:{source} for a file" if not colon else ""
        raise InputError(
            f"unknown source of text {source!r}{nearest(kind, KINDS)}: write builtin:python-stdlib, "
            f"tfds:NAME or text:GLOB{example}"
        )
    # A glob may end in a set of characters, so only the two names are splits there.
    split = r"train|validation" if kind == "text" else r"(?:[^\[\]]|\[[^\[\]]*\])*"
    matched = re.fullmatch(rf"(.+?)\[({split})\]", source)
    base = matched[1] if matched else source
    if kind == "builtin" and (name := base.partition(":")[2]) not in BUILTINS:
        raise InputError(f"there is no built-in text {name!r}{nearest(name, BUILTINS)}: it is builtin:{BUILTINS[0]}")
    return base, matched[2] if matched else None


def _dataset(base: str) -> Any:
    """The TFDS builder, prepared, behind `builtin:` or `tfds:`; None for text files."""
    kind, _, rest = base.partition(":")
    if kind == "text":
        return None
    from lm.data import dataset, stdlib  # TFDS takes half a second to import, of no use to text files

    return stdlib.prepared() if kind == "builtin" else dataset.named(*rest.partition("#")[::2])


def _own_validation(builder: Any) -> str | None:
    """The split that a dataset brings to be validated on, if it has one."""
    return next((name for name in OWN_VALIDATION if builder and name in builder.info.splits), None)


def _open(base: str, split: str | None, separator: str | None, builder: Any) -> Corpus:
    """Opens one split as it is; None: the whole text, of a dataset its train split."""
    kind, _, rest = base.partition(":")
    if builder is None:
        return Corpus(base, *text.documents(rest, separator))
    from lm.data import dataset

    feature, id_feature = ("text", "path") if kind == "builtin" else (rest.partition("#")[2] or None, None)
    ids, read = dataset.documents(builder, split or "train", feature, id_feature=id_feature)
    return Corpus(f"{base}[{split}]" if split else base, ids, read)


def _hold_out(whole: Corpus) -> tuple[Corpus, Corpus]:
    """Splits a corpus by `holdout`'s rule into what is trained on and what is validated on."""
    train, validation = f"{whole.source}[train]", f"{whole.source}[validation]"
    if len(whole) == 1:
        name, content = whole[0]
        middle = holdout.cut(content)
        if not 0 < middle < len(content):
            raise InputError(
                f"{whole.source} is one document of {len(content)} characters, too short to hold out its last tenth: "
                "use more text, or name a source in data.validation"
            )
        return (
            Corpus(train, [f"{name}[train]"], lambda _: content[:middle]),
            Corpus(validation, [f"{name}[validation]"], lambda _: content[middle:]),
        )
    held = holdout.held_out(whole.ids)
    kept = [index for index, name in enumerate(whole.ids) if name not in held]
    rest = [index for index, name in enumerate(whole.ids) if name in held]
    return _selected(train, whole, kept), _selected(validation, whole, rest)


def _selected(source: str, whole: Corpus, indices: Sequence[int]) -> Corpus:
    return Corpus(source, [whole.ids[index] for index in indices], lambda index: whole[indices[index]].text)
