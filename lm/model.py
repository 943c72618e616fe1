"""The Flax module around the pure functions of `lm/nn`: the only file that knows Flax."""

from __future__ import annotations

import jax
from flax import linen as nn

from lm.config import ModelConfig
from lm.nn import language_model, params
from lm.nn.source import Source

Array = jax.Array


class LM(nn.Module):
    """A language model as a Linen module.

    `init(key, tokens_BT)` draws the parameters that `lm/nn` declares, under "params"; `apply({"params": params},
    tokens_BT)` is `lm.nn.language_model.apply(params, tokens_BT, cfg=cfg)`. An encoder–decoder's take `source` too.
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens_BT: Array,
        segments_BT: Array | None = None,
        positions_BT: Array | None = None,
        *,
        dropout_keys_B: Array | None = None,
        source: Source | None = None,
    ) -> Array:
        """logits_BTV, float32, over the padded vocabulary."""
        tree = {
            name: self.param(name, lambda key, specs=specs: params.initialize(specs, key))
            for name, specs in language_model.model_specs(self.cfg).items()
        }
        return language_model.apply(
            tree, tokens_BT, segments_BT, positions_BT, cfg=self.cfg, dropout_keys_B=dropout_keys_B, source=source
        )
