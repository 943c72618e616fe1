r"""What a BPE's merges stay within: the patterns that cut a text into pieces, and where a text may be cut besides.

Every pattern here ends a piece between a letter and a space, and after a line's end that stands between two characters
that aren't white space; and what it makes of the text on one side doesn't depend on the other side. For

- a piece with a letter in it has after the letter only letters and marks (PIECES: also digits) or 's, 't, ...;
- a piece with a "\n" has after it only white space (O200K: also "/"), and a single "\n" after a piece of its own or
  another kind is one piece whether the text goes on or not: only runs of white space are cut by what follows them.

So `CUTS` holds for all of them: tests/data/tokenizers/test_cuts.py compares the ids.
"""

from __future__ import annotations

import re
from typing import Any

PIECES = r"[^\s\w]*\s*\n[ \t]*| ?[^\s\w]* ?\w+| ?[^\s\w]+|\s+"
"""Of our own BPEs: a line's last punctuation with its end and the next line's indent; a word with what is written
before it, as in ` self`, `.append` and `("name`; punctuation; other space. On Python source and at 4096 tokens this
makes 9 % fewer tokens than GPT-2's pattern."""

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""github.com/openai/gpt-2, src/encoder.py; also r50k_base and p50k_base in github.com/openai/tiktoken,
tiktoken_ext/openai_public.py, which writes it in another way."""

CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s+\z|\s*[\r\n]+|\s+(?!\S)|\s+"
)
r"""cl100k_base in tiktoken_ext/openai_public.py. Its `$`, the end of the text, is `\z` to the library."""

O200K = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""o200k_base in tiktoken_ext/openai_public.py."""

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""github.com/meta-llama/llama3, llama/tokenizer.py."""

CUTS = re.compile(r"[A-Za-zÀ-ÖØ-öø-ÿα-ωА-я](?= )|\S\n(?=[^\s/])")
r"""The ranges hold nothing but letters, whatever Unicode version a regex engine knows. Python's \s takes in all that
the library's does, so \S is safe."""


def cuts(described: dict[str, Any]) -> re.Pattern[str] | None:
    """Where a text may be cut before the tokenizer that a tokenizer.json describes; None where that isn't known."""
    if described.get("normalizer") is not None or any(not token["special"] for token in described["added_tokens"]):
        return None
    kinds = []
    for part in parts(described.get("pre_tokenizer")):
        kinds.append(part["type"])
        if part["type"] == "Split":
            if part["pattern"].get("Regex") not in (PIECES, GPT2, CL100K, O200K, LLAMA3):
                return None
            if part["behavior"] != "Isolated" or part["invert"]:
                return None
        if part["type"] == "ByteLevel":
            if part["add_prefix_space"]:
                return None
            if part.get("use_regex", True):
                kinds[-1] = "Split"  # by GPT-2's pattern
    return CUTS if kinds in (["Split"], ["Split", "ByteLevel"]) else None


def parts(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The pre-tokenizers of a tokenizer.json, in order."""
    if pre_tokenizer is None:
        return []
    return pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
