"""A small Llama folder as another program would write it, made with the safetensors library, not with our writer."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

CONFIG = {
    **{"model_type": "llama", "vocab_size": 259, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5},
    **{"hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "float32"},
}


def tensors(config=CONFIG):
    """The weights of a Llama, drawn."""
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = D // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.input_layernorm.weight": (D,), f"{at}.post_attention_layernorm.weight": (D,)}
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (keys if name in "kv" else D, D) for name in "qkvo"}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (F, D) for name in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (D, F)
    generator = np.random.default_rng(0)
    return {name: generator.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


class Folder:
    """A folder whose config and weights can be changed."""

    def __init__(self, path):
        self.path = path
        self.config(**CONFIG)
        self.weights(**tensors())

    def config(self, **fields):
        """Writes config.json: as it was, with these changes; a field of None is dropped."""
        file = self.path / "config.json"
        found = json.loads(file.read_text()) if file.exists() else {}
        kept = {name: value for name, value in {**found, **fields}.items() if value is not None}
        file.write_text(json.dumps(kept))
        return self

    def weights(self, **arrays):
        save_file(arrays, self.path / "model.safetensors")
        return self


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "theirs").mkdir()
    return Folder(tmp_path / "theirs")
