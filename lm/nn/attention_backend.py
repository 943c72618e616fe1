"""The attention back ends by name, what each can't do, and which one `model.attention` auto picks.

reference is exact in every respect and keeps all scores; prefix leaves out those that causality masks; shifted, for
scoring, needs no pass for their maxima; blockwise never holds them whole; cudnn and splash are fused kernels of one
kind of accelerator. All compute `lm.nn.attention.attend`, or are refused before anything compiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lm.config import InputError, ModelConfig
from lm.nn.attention import Attend, attend
from lm.nn.blockwise_attention import attend_blockwise
from lm.nn.fused_attention import attend_cudnn
from lm.nn.prefix_attention import attend_prefix
from lm.nn.shifted_attention import attend_shifted
from lm.nn.splash_attention import attend_splash

BACKENDS: Mapping[str, Attend] = {
    "reference": attend,
    "prefix": attend_prefix,
    "shifted": attend_shifted,
    "blockwise": attend_blockwise,
    "cudnn": attend_cudnn,
    "splash": attend_splash,
}
LONG = 256
"""Tokens from which blocks are faster on CPUs: the scores of longer rows leave the caches."""
LONGEST_PREFIX = {"float32": 2048, "tensorfloat32": 2048, "bfloat16": 1024}
"""Tokens up to which a CPU makes all probabilities of a layer that causality leaves at once, by `model.compute_dtype`:
blocks cost products, and these are T² / 2 numbers a head."""
NARROW = 32
"""Head width up to which exponentials are what attention on CPUs takes longest for. At 8 to 32 and 511 tokens shifted
takes 0.7 to 0.9 of prefix's time; it compiles two to four times as long."""
LONG_ON_ACCELERATORS = 2048
"""The same where memory is fast: from here on the scores of a row, T² of float32 a head, are what fills it."""
LONGEST_DENSE = 16384
"""Tokens up to which a GPU holds a dense mask for packed rows: 2 T² bytes a row, here 512 MiB."""


class Site(NamedTuple):
    """Where attention is to run, and on what.

    platform: "cpu", "gpu" or "tpu". compute_capability: of an NVIDIA GPU, as (9, 0); None for every other device.
    length: tokens in a row. segments: whether rows hold several pieces. dropout: whether probabilities are dropped.
    training: whether gradients are taken. source_length: tokens in a row of sources; None: no cross-attention.
    """

    platform: str
    compute_capability: tuple[int, int] | None
    length: int
    segments: bool
    dropout: bool
    training: bool
    source_length: int | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Those of all rows."""
        return (self.length,) if self.source_length is None else (self.length, self.source_length)


class Choice(NamedTuple):
    """A back end, and why it."""

    name: str
    reason: str


def choose(cfg: ModelConfig, site: Site) -> Choice:
    """The back end that `model.attention` names or, if it is auto, the fastest that does all that is asked of it.

    Raises InputError if the one that is named can't.
    """
    if cfg.attention != "auto":
        problem = refusal(cfg.attention, cfg, dropout=site.dropout) or _misplaced(cfg.attention, cfg, site)
        if problem is not None:
            raise InputError(f"model.attention is {cfg.attention!r}, but {problem}")
        return Choice(cfg.attention, "model.attention says so")
    kernel = {"gpu": "cudnn", "tpu": "splash"}.get(site.platform)
    longest = max(site.lengths)
    excuse = f"{longest} tokens"
    if kernel is not None:
        problem = refusal(kernel, cfg, dropout=site.dropout) or _misplaced(kernel, cfg, site)
        if problem is None:
            return Choice(kernel, _praise(kernel, site))
        excuse = f"not {kernel}: {problem.partition(': ')[0]}; {excuse}"
    if cfg.positions == "relative":
        return Choice("reference", f"relative positions are added to scores; {excuse}")
    if site.dropout:
        return Choice("reference", f"dropout on attention probabilities; {excuse}")
    long = LONG if site.platform == "cpu" else LONG_ON_ACCELERATORS
    if longest < long:
        return Choice("reference", f"{excuse}, fewer than the {long} from which blocks pay on a {site.platform}")
    if site.platform == "cpu" and longest <= LONGEST_PREFIX[cfg.compute_dtype]:
        if not site.training and cfg.head_width <= NARROW and cfg.attention_softcap is None:
            return Choice("shifted", f"{excuse}, heads of {cfg.head_width}, no gradients: blocks of keys on their own")
        return Choice("prefix", f"{excuse}: blocks of queries, each against the keys before its end")
    return Choice("blockwise", f"{excuse}: the scores of a block at a time, not {longest} x {longest}")


def refusal(name: str, cfg: ModelConfig, *, dropout: bool) -> str | None:
    """Why a back end can't compute a model's attention anywhere, with the way out; None: it can."""
    if name == "reference":
        return None
    others = "set model.attention to 'auto' or 'reference'"
    if cfg.positions == "relative":
        return f"model.positions 'relative' adds to scores, which it never holds whole: {others}"
    if dropout:
        return f"model.dropout {cfg.dropout} falls on attention probabilities too, which it doesn't hold: {others}"
    if name in ("blockwise", "prefix", "shifted"):
        return None
    if cfg.compute_dtype != "bfloat16":
        return f"its products are in bfloat16 and model.compute_dtype is {cfg.compute_dtype!r}: set that, or {others}"
    if name == "cudnn" and cfg.attention_softcap is not None:
        return f"cuDNN has no cap on scores and model.attention_softcap is {cfg.attention_softcap}: {others}"
    if name == "cudnn" and (cfg.head_width % 8 or cfg.head_width > 256):
        return f"cuDNN wants heads of a multiple of 8 up to 256 wide and these are {cfg.head_width}: {others}"
    return None


def _misplaced(name: str, cfg: ModelConfig, site: Site) -> str | None:
    """Why a back end can't run at a site, with the way out; None: it can."""
    others = "set model.attention to 'auto'"
    if name == "splash" and site.platform != "tpu":
        return f"it runs on TPUs and this is a {site.platform}: {others}"
    if name != "cudnn":
        return None
    if site.compute_capability is None or site.compute_capability < (8, 0):
        here = "a GPU of another kind" if site.platform == "gpu" else f"a {site.platform}"
        if site.compute_capability is not None:
            here = "one of compute capability {}.{}".format(*site.compute_capability)
        return f"it runs on NVIDIA GPUs of compute capability 8.0 or more and this is {here}: {others}"
    if site.compute_capability < (9, 0) and cfg.head_width > 128:
        return f"before Hopper cuDNN wants heads up to 128 wide and these are {cfg.head_width}: {others}"
    longest, odd = max(site.lengths), [length for length in site.lengths if length % 2]
    if site.segments and longest > LONGEST_DENSE:
        return f"packed rows of {longest} tokens need a dense mask, which is held up to {LONGEST_DENSE}: {others}"
    if site.segments and site.training and odd:
        return f"with a mask cuDNN wants rows of an even length and these have {odd[0]} tokens: {others}"
    return None


def _praise(kernel: str, site: Site) -> str:
    if kernel == "splash":
        return "the fused kernel of TPUs"
    return "the fused kernel of NVIDIA GPUs" + (
        "; packed rows by a dense mask, which is less than the scores in memory" if site.segments else ""
    )


def unplaced(cfg: ModelConfig, length: int, *, dropout: bool) -> Attend:
    """The back end for arrays that may be anywhere: the named one, or of auto's those that run on every device."""
    if cfg.attention != "auto":
        return BACKENDS[cfg.attention]
    site = Site("cpu", None, length, segments=True, dropout=dropout, training=True)
    return BACKENDS[choose(cfg, site).name]
