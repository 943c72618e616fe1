"""How each kind of parameter is drawn."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from lm.config import ModelConfig
from lm.nn import params as declare


class Initializers(NamedTuple):
    """How each kind of parameter is drawn, by `model.initializer`."""

    table: Any
    qkv: Any  # (inputs, outputs) -> Initializer
    out: Any
    up: Any  # inputs -> Initializer
    down: Any
    bias: Any  # inputs of the matrix it goes with -> Initializer


def initializers(cfg: ModelConfig) -> Initializers:
    """The initializers of a config."""
    drawn = _drawn(cfg)
    zeros = {"out": lambda *_: declare.zeros, "down": lambda _: declare.zeros}
    return drawn._replace(**zeros) if cfg.zero_init_outputs else drawn


def _drawn(cfg: ModelConfig) -> Initializers:
    if cfg.initializer == "torch":  # the defaults of torch.nn.TransformerEncoderLayer; tables as the tutorial sets them
        linear = lambda inputs: declare.uniform(inputs**-0.5)  # noqa: E731
        xavier = lambda inputs, outputs: declare.uniform(math.sqrt(6 / (inputs + outputs)))  # noqa: E731
        return Initializers(declare.uniform(0.1), xavier, lambda inputs, _: linear(inputs), linear, linear, linear)
    plain = declare.normal(cfg.init_std)
    # Radford et al. 2019, section 2.3: the sum of 2L block outputs keeps its variance; 3L with cross-attention.
    blocks = (3 if cfg.has_encoder else 2) * cfg.num_layers
    scaled = declare.normal(cfg.init_std / math.sqrt(blocks))
    return Initializers(
        plain, lambda *_: plain, lambda *_: scaled, lambda _: plain, lambda _: scaled, lambda _: declare.zeros
    )
