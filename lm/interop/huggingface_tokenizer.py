"""The tokenizer of a Hugging Face folder, and which of its ids mean begin and end."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm.config import InputError
from lm.data import tokenizer as tokenizers
from lm.data.tokenizer import FileTokenizer, SentencePieceTokenizer, SpecialIds, Tokenizer
from lm.data.tokenizers import special_ids
from lm.interop.huggingface_config import NAME, read_file
from lm.run_directory import listed

GENERATION, CONFIG = "generation_config.json", special_ids.CONFIG_NAME
_FILES = (*tokenizers.FILE_NAMES, "vocab.json", "*.model", "*.tiktoken")


def load(folder: Path, config: Mapping[str, Any], vocabulary: int) -> Tokenizer | None:
    """The tokenizer of a folder; None where there is none.

    BOS and EOS are those of tokenizer_config.json, else of generation_config.json, else of `config` (config.json's
    fields), else what the names of its tokens say. Raises InputError for one that makes ids of text that the model, of
    `vocabulary` tokens, has no rows for.
    """
    if not any(any(folder.glob(name)) for name in _FILES):
        return None
    tokenizer = tokenizers.load(folder)
    if tokenizer.vocab_size > vocabulary and (surplus := _surplus(tokenizer, vocabulary)):
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model embeds {vocabulary}: "
            f"it is another model's (tokens without a row: {listed(surplus)})"
        )
    if not isinstance(tokenizer, FileTokenizer | SentencePieceTokenizer):
        return tokenizer
    ids = SpecialIds(tokenizer.bos, tokenizer.eos, tokenizer.pad)
    generation = folder / GENERATION
    given = read_file(generation) if generation.is_file() else {}
    decided = special_ids.read_config(folder)
    limit = min(vocabulary, tokenizer.vocab_size)
    for role in ("bos", "eos"):
        if f"{role}_token" in decided:
            continue
        for source, fields in ((generation, given), (folder / NAME, config)):
            if fields.get(f"{role}_token_id") is not None:
                ids = ids._replace(**{role: _id(fields[f"{role}_token_id"], limit, role, source)})
                break
    for role, number in ids._asdict().items():
        if number is not None and number >= vocabulary:
            ids = ids._replace(**{role: _id(number, limit, role, folder)})
    return tokenizer.with_special_ids(ids)


def ids(tokenizer: Tokenizer | None) -> dict[str, int]:
    """The special ids as config.json and generation_config.json call them."""
    if tokenizer is None:
        return {}
    found = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    return {name: number for name, number in found.items() if number is not None}


def describe(tokenizer: Tokenizer, positions: int) -> dict[str, Any]:
    """tokenizer_config.json: with it AutoTokenizer opens the file as it is."""
    fields: dict[str, Any] = {"model_max_length": positions, "clean_up_tokenization_spaces": False}
    if tokenizer.file_name != tokenizers.FILE_NAME:
        warnings.warn(
            f"{tokenizer.file_name} is exported as it is, but transformers opens it by rules of its own: ids differ "
            "unless it is a BPE without normalisation, as Llama's",
            stacklevel=2,
        )
        return {"tokenizer_class": "LlamaTokenizer", **fields}
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", **fields}
    described = json.loads(tokenizer.content)
    names = {token["id"]: token["content"] for token in described["added_tokens"]}
    for role in ("bos", "eos", "pad"):
        number = getattr(tokenizer, role)
        fields[f"{role}_token"] = names.get(number)
    return fields


def _id(value: Any, limit: int, role: str, where: Path) -> int | None:
    """A special id of a config, the first of several; one outside the vocabulary counts as none, with a warning."""
    number = value[0] if isinstance(value, list) and value else value
    if type(number) is int and 0 <= number < limit:
        return number
    warnings.warn(f"{where}: {role}_token_id {value!r} is not in the vocabulary of {limit}; none is used", stacklevel=2)
    return None


def _surplus(tokenizer: Tokenizer, vocabulary: int) -> list[str]:
    """Tokens without a row that a text could be made into; special ones never are."""
    if not isinstance(tokenizer, FileTokenizer):
        return [f"ids {vocabulary} to {tokenizer.vocab_size - 1}"]
    described = json.loads(tokenizer.content)
    special = {token["content"] for token in described["added_tokens"] if token["special"]}
    added = {token["content"]: token["id"] for token in described["added_tokens"]}
    plain = described["model"]["vocab"]
    plain = plain if isinstance(plain, dict) else {piece: number for number, (piece, _) in enumerate(plain)}
    return [
        repr(token) for token, number in {**plain, **added}.items() if number >= vocabulary and token not in special
    ]
