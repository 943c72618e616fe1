"""GPT-2's pair of files: vocab.json (letters of bytes -> id) and merges.txt (`left right` a line, in order)."""

from __future__ import annotations

import json
from pathlib import Path

from lm.config import InputError
from lm.data.tokenizers.byte_tokenizer import byte_letters, byte_level, byte_level_file, special_token
from lm.data.tokenizers.special_ids import read_config

VOCABULARY, MERGES = "vocab.json", "merges.txt"


def tokenizer_json(vocabulary_path: Path, merges_path: Path) -> str:
    """Both as one tokenizer.json. A token that is neither a byte nor the result of a merge is special."""
    for path, other in ((vocabulary_path, merges_path), (merges_path, vocabulary_path)):
        if not path.is_file():
            raise InputError(f"there is no {path}: {other.name} needs {path.name} beside it")
    vocabulary = _vocabulary(vocabulary_path)
    merges = _merges(merges_path)
    if lacking := [letter for letter in byte_letters() if letter not in vocabulary]:
        raise InputError(
            f"{vocabulary_path} is not a byte-level vocabulary as GPT-2's: it has no {lacking[0]!r}. "
            "Give the model's tokenizer.json"
        )
    made = set(byte_letters())
    for line, (left, right) in merges:
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise InputError(
                f"{merges_path}:{line}: {left!r} + {right!r} is not in {vocabulary_path}: the two files don't belong "
                "together"
            )
        made.add(left + right)
    special = sorted((number, token) for token, number in vocabulary.items() if token not in made)
    prefix = bool(read_config(vocabulary_path.parent).get("add_prefix_space", False))
    described = byte_level_file(
        vocabulary,
        [pair for _, pair in merges],
        [special_token(number, token) for number, token in special],
        pre_tokenizer=byte_level(use_regex=True, add_prefix_space=prefix),
        ignore_merges=False,
    )
    return json.dumps(described, ensure_ascii=False)


def _vocabulary(path: Path) -> dict[str, int]:
    try:
        vocabulary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} can't be read: {error}. Get it again") from error
    if not isinstance(vocabulary, dict) or not all(type(number) is int for number in vocabulary.values()):
        raise InputError(f"{path} is not a vocabulary: it must map tokens to ids")
    if missing := set(range(len(vocabulary))) - set(vocabulary.values()):
        raise InputError(f"{path} has {len(vocabulary)} tokens, but none has the id {min(missing)}: get it again")
    return vocabulary


def _merges(path: Path) -> list[tuple[int, tuple[str, str]]]:
    """The pairs with their line numbers."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except ValueError as error:
        raise InputError(f"{path} can't be read: {error}. Get it again") from error
    merges = []
    for number, line in enumerate(lines, 1):
        pair = line.rstrip("\r").split(" ")
        if pair == [""] or (number == 1 and line.startswith("#version")):
            continue
        if len(pair) != 2:
            raise InputError(f"{path}:{number}: {line!r} is not two tokens with a space between them")
        merges.append((number, (pair[0], pair[1])))
    return merges
