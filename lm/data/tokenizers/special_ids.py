"""Which ids mean begin, end and padding: by the names of tokens, unless a tokenizer_config.json decides."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from lm.config import InputError

BOS, EOS = "<|bos|>", "<|eos|>"
"""The special tokens of our own tokenizers: their last two ids."""
KNOWN_BOS = (BOS, "<s>", "<bos>", "<BOS>", "[BOS]", "<|begin_of_text|>", "<|startoftext|>", "<|begin_of_sentence|>")
KNOWN_EOS = (EOS, "</s>", "<eos>", "<EOS>", "[EOS]", "<|end_of_text|>", "<|endoftext|>", "<|end_of_sentence|>")
KNOWN_PAD = ("<|pad|>", "<pad>", "<PAD>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>")
"""How special tokens are known in a file, which doesn't say what they are for; the first that it has."""
CONFIG_NAME = "tokenizer_config.json"


class SpecialIds(NamedTuple):
    """None: the tokenizer has no such token."""

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None


def by_name(special: Mapping[str, int]) -> SpecialIds:
    """The roles of a file's special tokens, as their names tell."""
    known = (KNOWN_BOS, KNOWN_EOS, KNOWN_PAD)
    return SpecialIds(*(next((special[name] for name in names if name in special), None) for names in known))


def by_config(folder: Path, find: Callable[[str], int | None], otherwise: SpecialIds) -> SpecialIds:
    """The roles that the folder's tokenizer_config.json gives out; `otherwise` for those that it doesn't mention.

    A token that `find` has no id for counts as none, with a warning.
    """
    described = read_config(folder)
    chosen = {}
    for role in SpecialIds._fields:
        if f"{role}_token" not in described:
            continue
        token = described[f"{role}_token"]
        if isinstance(token, dict):
            token = token.get("content")
        chosen[role] = None if token is None else find(str(token))
        if token is not None and chosen[role] is None:
            where = folder / CONFIG_NAME
            warnings.warn(f"{where}: {role}_token {token!r} is not in the vocabulary; none is used", stacklevel=2)
    return otherwise._replace(**chosen)


def read_config(folder: Path) -> dict[str, object]:
    """A folder's tokenizer_config.json; empty where there is none."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        return {}
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read: {error}. Repair or remove it") from error
    if not isinstance(described, dict):
        raise InputError(f"{path} is not a JSON object: repair or remove it")
    return described
