"""Text <-> token ids: bytes, a BPE trained on the corpus, or a file in one of the field's formats.

All but SentencePiece's are kept as a `tokenizer.json`, so that what we save opens in `tokenizers` with the same ids.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers

from lm.config import InputError, TokenizerConfig
from lm.data import cache
from lm.data.tokenizers import sentencepiece_model, special_ids, tiktoken_ranks, vocab_and_merges
from lm.data.tokenizers.base import FILE_NAME, Tokenizer
from lm.data.tokenizers.bpe import COVERAGE, train_bpe, train_tokenizer
from lm.data.tokenizers.byte_tokenizer import ByteTokenizer, byte_file
from lm.data.tokenizers.file_tokenizer import FileTokenizer
from lm.data.tokenizers.sentencepiece_model import SentencePieceTokenizer
from lm.data.tokenizers.special_ids import BOS, EOS, SpecialIds
from lm.data.tokenizers.split_patterns import PIECES

__all__ = ["BOS", "EOS", "FILE_NAME", "FILE_NAMES", "ByteTokenizer", "FileTokenizer", "SentencePieceTokenizer"]
__all__ += ["SpecialIds", "Tokenizer", "build", "load", "train_bpe", "train_tokenizer"]

FILE_NAMES = (FILE_NAME, sentencepiece_model.FILE_NAME)
"""What `Tokenizer.save` calls its file in a folder: one of these."""
_FORMATS = f"a {FILE_NAME}, a SentencePiece .model, a tiktoken rank file, or vocab.json with merges.txt beside it"


def load(path: str | os.PathLike[str]) -> Tokenizer:
    """Opens a tokenizer's file, or the one in a folder, whatever its format; the first line tells which.

    A tokenizer_config.json beside it decides BOS, EOS and padding where it names them. Raises InputError where there is
    none that can be read.
    """
    file = _find(Path(path))
    try:
        with file.open("rb") as opened:
            start = opened.read(64)
            line = start + opened.readline(1 << 16)
        tokenizer = _open(file, line)
    except OSError as error:
        raise InputError(f"{file} can't be read: {error.strerror}") from error
    if isinstance(tokenizer, FileTokenizer | SentencePieceTokenizer):
        today = SpecialIds(tokenizer.bos, tokenizer.eos, tokenizer.pad)
        return tokenizer.with_special_ids(special_ids.by_config(file.parent, tokenizer.find, today))
    return tokenizer


def build(config: TokenizerConfig, corpora: Any, *, progress: Callable[[int, int], None] | None = None) -> Tokenizer:
    """The tokenizer that a config asks for. A BPE is trained on the corpora once and then taken from the cache; while
    another process trains it, it is waited for.

    Args:
      corpora: a Corpus, or a sequence of them: all their documents are trained on.
      progress: called with (bytes read, bytes in all) while training.
    """
    if config.kind == "bytes":
        return ByteTokenizer()
    if config.kind == "file":
        assert config.path is not None, "checked by lm.validation"
        return load(config.path)
    corpora = list(corpora) if isinstance(corpora, list | tuple) else [corpora]
    how = [config.vocab_size, config.byte_fallback, config.special_tokens, COVERAGE, tokenizers.__version__, PIECES]
    recipe = json.dumps([[corpus.key for corpus in corpora], *how])
    folder = cache.directory("tokenizers", hashlib.sha256(recipe.encode()).hexdigest()[:32])

    def kept() -> Tokenizer | None:
        with contextlib.suppress(OSError, InputError):  # not there, or damaged since
            return _from_json((folder / FILE_NAME).read_bytes(), folder, "bpe")
        return None

    if (found := kept()) is not None:
        return found
    with cache.locked(folder / ".lock"):
        if (found := kept()) is not None:  # another process has trained it while this one waited
            return found
        trained = train_tokenizer(
            corpora,
            config.vocab_size,
            byte_fallback=config.byte_fallback,
            special_tokens=config.special_tokens,
            progress=progress,
        )
        trained.save(folder)
    return trained


def _find(path: Path) -> Path:
    if path.is_dir():
        names = (*FILE_NAMES, vocab_and_merges.VOCABULARY)
        others = sorted([*path.glob("*.model"), *path.glob("*.tiktoken")])
        found = [path / name for name in names if (path / name).is_file()] or (others if len(others) == 1 else [])
        if not found:
            raise InputError(f"there is no tokenizer in {path}: give the path of {_FORMATS}")
        return found[0]
    if not path.is_file():
        raise InputError(f"there is no tokenizer at {path}: give the path of {_FORMATS}, or its folder")
    return path


def _open(file: Path, line: bytes) -> Tokenizer:
    """`line` is the file's first, or its beginning."""
    if file.name == vocab_and_merges.MERGES or line.startswith(b"#version"):
        return _from_json(vocab_and_merges.tokenizer_json(file.with_name(vocab_and_merges.VOCABULARY), file), file)
    if tiktoken_ranks.LINE.fullmatch(line.split(b"\n")[0]):
        return _from_json(tiktoken_ranks.tokenizer_json(file), file)
    if line[:1] == line[2:3] == b"\n":  # a protocol buffer whose first field, a piece, begins with its first, the text
        return SentencePieceTokenizer(file.read_bytes(), file)
    if not line.lstrip().startswith(b"{"):
        raise InputError(f"{file} is not a tokenizer that can be read: give {_FORMATS}")
    content = file.read_bytes()
    if content == byte_file():
        return ByteTokenizer()
    try:
        described = json.loads(content)
    except ValueError as error:
        raise InputError(f"{file} is not a {FILE_NAME}: {error}") from error
    if isinstance(described, dict) and described and all(type(number) is int for number in described.values()):
        return _from_json(vocab_and_merges.tokenizer_json(file, file.with_name(vocab_and_merges.MERGES)), file)
    return _from_json(content, file)


def _from_json(content: str | bytes, file: Path, kind: str = "file") -> FileTokenizer:
    try:
        return FileTokenizer(content, kind)
    except Exception as error:  # the library raises no narrower type
        raise InputError(f"{file} is not a {FILE_NAME} that the tokenizers library reads: {error}") from error
