"""States of models on torch.nn.TransformerEncoder, without torch; tests/parity compares with torch itself."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lm.config import InputError
from lm.interop.huggingface_config import arithmetic
from lm.interop.torch_transformer import load_state_dict, save_state_dict
from lm.nn import params as declare
from lm.nn.language_model import model_specs
from tests.conftest import SHAPES, resolved

CFG = resolved(SHAPES["tutorial"])


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    params = declare.initialize(model_specs(CFG), jax.random.key(0))
    path = save_state_dict(tmp_path_factory.mktemp("state") / "model.safetensors", CFG, params, positions=40)
    return params, path


def test_there_and_back(state):
    params, path = state
    cfg, found = load_state_dict(path, CFG.num_heads)
    assert arithmetic(cfg) == arithmetic(CFG)
    rows = params["embed"]["tokens"][: CFG.vocabulary]
    assert np.array_equal(found["embed"]["tokens"], rows)
    jax.tree.map(np.testing.assert_array_equal, found["layers"], params["layers"])
    assert load_file(path)["pos_encoder.pe"].shape == (40, 1, CFG.d_model)


def test_wrong_states_are_refused(state, tmp_path):
    _, path = state
    arrays, other = load_file(path), tmp_path / "other.safetensors"

    def opened(**changes):
        found = {name: array for name, array in {**arrays, **changes}.items() if array is not None}
        save_file(found, other)
        return load_state_dict(other, CFG.num_heads)

    with pytest.raises(InputError, match="num_heads 3 does not divide"):
        load_state_dict(path, 3)
    with pytest.raises(InputError, match="has no encoder.weight or embedding.weight"):
        opened(**{"encoder.weight": None})
    with pytest.raises(InputError, match="layers.1.norm2.bias"):
        opened(**{"transformer_encoder.layers.1.norm2.bias": None})
    with pytest.raises(InputError, match="no place for: transformer_encoder.norm.weight"):
        opened(**{"transformer_encoder.norm.weight": np.ones(32, np.float32)})
    with pytest.raises(InputError, match="doesn't hold the sinusoids"):
        opened(**{"pos_encoder.pe": arrays["pos_encoder.pe"][::-1].copy()})
    opened(**{"pos_encoder.pe": None})
    opened(**{"pos_encoder.pe": arrays["pos_encoder.pe"].transpose(1, 0, 2).copy()})  # batch first


@pytest.mark.parametrize("change", [{"activation": "gelu"}, {"norm_position": "pre"}, {"norm_epsilon": 1e-6}], ids=str)
def test_other_models_are_not_written(change, state, tmp_path):
    with pytest.raises(InputError, match=f"model.{next(iter(change))}"):
        save_state_dict(tmp_path / "x.safetensors", dataclasses.replace(CFG, **change), state[0])
    assert not list(tmp_path.iterdir())
