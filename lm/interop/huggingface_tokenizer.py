"""The tokenizer of a Hugging Face folder, and which of its ids mean begin and end."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Library

from lm.config import InputError, ModelConfig
from lm.data import tokenizer as tokenizers
from lm.data.tokenizer import FileTokenizer, SentencePieceTokenizer, SpecialIds, Tokenizer
from lm.data.tokenizers import special_ids
from lm.interop.huggingface_config import NAME, read_file
from lm.run_directory import listed

GENERATION, CONFIG = "generation_config.json", special_ids.CONFIG_NAME
T5_NAME = "spiece.model"
"""What transformers calls T5's SentencePiece model."""
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
            f"it is another model's, or vocab_size is wrong (tokens without a row: {listed(surplus)})"
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


def start(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The id that targets follow, as `config` (config.json's fields) calls it, where generation_config.json has it.

    Raises InputError where the two say different ones.
    """
    file, name = folder / GENERATION, "decoder_start_token_id"
    given, own = read_file(file).get(name) if file.is_file() else None, config.get(name)
    if given is not None and own is not None and given != own:
        raise InputError(f"{folder / NAME}: {name} {own!r} contradicts {given!r} in {file.name}: change one of the two")
    return {} if given is None else {name: given}


def ids(tokenizer: Tokenizer | None, model: ModelConfig) -> dict[str, int]:
    """The special ids as config.json and generation_config.json call them.

    An encoder-decoder without a token for padding is padded with the one that targets follow, as T5 is.
    """
    roles = ("bos", "eos", "pad") if tokenizer is not None else ()
    found = {f"{role}_token_id": getattr(tokenizer, role) for role in roles}
    if model.has_encoder:
        padding = found.get("pad_token_id")
        found["pad_token_id"] = model.start_id if padding is None else padding
        found["decoder_start_token_id"] = model.start_id
    return {name: number for name, number in found.items() if number is not None}


def save(tokenizer: Tokenizer, folder: Path, model: ModelConfig) -> Path:
    """Writes the tokenizer's file as AutoTokenizer looks for it.

    That of an encoder-decoder makes transformers put EOS behind every text, as sources and targets are read here.
    """
    if not model.has_encoder:
        return tokenizer.save(folder)
    if tokenizer.file_name != tokenizers.FILE_NAME:
        return tokenizer.save(folder / T5_NAME)
    target = folder / tokenizer.file_name
    target.write_bytes(_ended(tokenizer))
    return target


def describe(tokenizer: Tokenizer, model: ModelConfig, model_type: str) -> dict[str, Any]:
    """tokenizer_config.json: with it AutoTokenizer opens the file as it is."""
    fields: dict[str, Any] = {"model_max_length": model.position_rows, "clean_up_tokenization_spaces": False}
    if isinstance(tokenizer, SentencePieceTokenizer):
        as_t5 = model.has_encoder and tokenizer.eos is not None and tokenizer.eos == tokenizer.find("</s>")
        if not as_t5:
            warnings.warn(
                f"{tokenizer.file_name} is exported as it is, but transformers opens it by rules of its own: ids "
                "differ unless it is a BPE without normalisation, as Llama's",
                stacklevel=2,
            )
        own = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0} if as_t5 else {"tokenizer_class": "LlamaTokenizer"}
        return {**own, **fields}
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", **fields}
    described = json.loads(tokenizer.content)
    if model_type == "qwen2" and (described.get("normalizer") or {}).get("type") != "NFC":
        warnings.warn(
            f"{tokenizer.file_name} is exported as it is, but transformers opens that of a qwen2 folder with Qwen's "
            "own normalisation and pre-tokenisation, whatever it says: ids of some texts differ",
            stacklevel=2,
        )
    names = {token["id"]: token["content"] for token in described["added_tokens"]}
    for role in ("bos", "eos", "pad"):
        number = getattr(tokenizer, role)
        fields[f"{role}_token"] = names.get(number)
    return fields


def _ended(tokenizer: Tokenizer) -> bytes:
    """A tokenizer.json that adds EOS behind a text, and nothing else; as it is where it does, or has none."""
    library = Library.from_str(tokenizer.content.decode())
    if tokenizer.eos is None or library.encode("").ids == [tokenizer.eos]:
        return tokenizer.content
    name = library.id_to_token(tokenizer.eos)
    single, second = (
        [{"Sequence": {"id": which, "type_id": 0}}, {"SpecialToken": {"id": name, "type_id": 0}}] for which in "AB"
    )
    described = json.loads(tokenizer.content)
    described["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single + second,
        "special_tokens": {name: {"id": name, "ids": [tokenizer.eos], "tokens": [name]}},
    }
    return json.dumps(described, ensure_ascii=False).encode()


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
