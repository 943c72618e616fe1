"""tiktoken's rank files: `base64(token) rank` a line. They hold the merges, but neither pattern nor special tokens."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from lm.config import InputError
from lm.data.tokenizers.byte_tokenizer import byte_letters, byte_level, byte_level_file, special_token
from lm.data.tokenizers.split_patterns import CL100K, GPT2, LLAMA3, O200K

LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n?")


class Encoding(NamedTuple):
    """What a rank file leaves unsaid."""

    name: str
    pattern: str
    special: dict[str, int]


def _llama3() -> dict[str, int]:
    """256 names (github.com/meta-llama/llama3, llama/tokenizer.py)."""
    reserved = [f"<|reserved_special_token_{number}|>" for number in range(251)]
    names = ["<|begin_of_text|>", "<|end_of_text|>", *reserved[:4], "<|start_header_id|>", "<|end_header_id|>"]
    names += [reserved[4], "<|eot_id|>", *reserved[5:]]
    return {name: 128000 + number for number, name in enumerate(names)}


KNOWN = {
    50256: Encoding("GPT-2, r50k_base", GPT2, {"<|endoftext|>": 50256}),
    50280: Encoding("p50k_base", GPT2, {"<|endoftext|>": 50256}),
    100256: Encoding(
        "cl100k_base",
        CL100K,
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    199998: Encoding("o200k_base", O200K, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
    128000: Encoding("Llama 3", LLAMA3, _llama3()),
}
"""By the number of ranks (github.com/openai/tiktoken, tiktoken_ext/openai_public.py; Llama 3: see above)."""


def tokenizer_json(path: Path) -> str:
    """The file at `path` as a tokenizer.json with the ids that tiktoken gives."""
    ranks = read_ranks(path)
    if len(ranks) not in KNOWN:
        known = ", ".join(f"{number} ({encoding.name})" for number, encoding in KNOWN.items())
        raise InputError(
            f"{path} has {len(ranks)} ranks, and a rank file doesn't hold its split pattern and special tokens: known "
            f"are {known}. Convert it to a tokenizer.json (transformers does) and give that"
        )
    return convert(ranks, KNOWN[len(ranks)], path)


def convert(ranks: Mapping[bytes, int], encoding: Encoding, path: Path) -> str:
    """A tokenizer.json. tiktoken merges the two neighbours that are the lowest rank together; a BPE lists the pairs."""
    taken = {*ranks.values(), *encoding.special.values()}
    if missing := sorted(set(range(len(ranks))) - taken):
        raise InputError(f"{path} has no rank {missing[0]}: ranks count from 0 without gaps. Get the file again")
    if clash := set(ranks.values()) & set(encoding.special.values()):
        raise InputError(f"{path} gives rank {min(clash)} to a token, which {encoding.name} has for a special one")
    letters = byte_letters()
    if lacking := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise InputError(f"{path} has no token for byte {lacking[0]}: it is not a byte-level vocabulary")
    table = dict(enumerate(letters))
    written = {token: token.decode("latin-1").translate(table) for token in ranks}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        pair = _parts(token, rank, ranks)
        if pair is not None:
            merges.append((written[pair[0]], written[pair[1]]))
    vocabulary = {written[token]: rank for token, rank in ranks.items()} | encoding.special
    split = {"type": "Split", "pattern": {"Regex": encoding.pattern}, "behavior": "Isolated", "invert": False}
    described = byte_level_file(
        vocabulary,
        merges,
        [special_token(number, name) for name, number in encoding.special.items()],
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, byte_level(use_regex=False)]},
        ignore_merges=True,
    )
    return json.dumps(described, ensure_ascii=False)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Tokens and their ranks. Raises InputError with the line that can't be read."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            if not LINE.fullmatch(line):
                raise ValueError("not `base64 rank`")
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise InputError(f"{path}:{number}: {error}: it is not a whole tiktoken file, get it again") from error
    if len(set(ranks.values())) < len(ranks):
        raise InputError(f"{path} gives a rank to two tokens: it is not a whole tiktoken file, get it again")
    return ranks


def _parts(token: bytes, rank: int, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that merging makes this one of; None where it is only ever taken whole."""
    if len(token) == 1:
        return None
    cuts = [
        (token[:cut], token[cut:])
        for cut in range(1, len(token))
        if ranks.get(token[:cut], rank) < rank and ranks.get(token[cut:], rank) < rank
    ]
    if len(cuts) <= 1:
        return cuts[0] if cuts else None
    parts = [token[place : place + 1] for place in range(len(token))]
    while len(parts) > 2:
        found = [ranks.get(left + right, rank) for left, right in zip(parts, parts[1:], strict=False)]
        lowest = min(found)
        if lowest >= rank:
            return None
        place = found.index(lowest)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts[0], parts[1]
