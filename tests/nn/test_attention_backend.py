"""Which attention back end is chosen where, and what is refused with which reason."""

from __future__ import annotations

import dataclasses

import pytest

from lm.config import InputError, ModelConfig, RunConfig
from lm.nn.attention import attend
from lm.nn.attention_backend import BACKENDS, LONGEST_DENSE, Site, choose, unplaced
from lm.nn.blockwise_attention import attend_blockwise
from lm.validation import validate

MODEL = ModelConfig(d_model=512, num_heads=8, compute_dtype="bfloat16")
CPU = Site("cpu", None, 128, segments=True, dropout=False, training=True)
LONG_CPU = CPU._replace(length=8192)
H100 = Site("gpu", (9, 0), 1024, segments=True, dropout=False, training=True)
A100, V100, AMD = (H100._replace(compute_capability=number) for number in ((8, 0), (7, 0), None))
TPU = Site("tpu", None, 1024, segments=True, dropout=False, training=True)

# (fields of the model, where, the choice, a part of the reason)
PICKED = [
    ({}, CPU, "reference", "128 tokens"),
    ({}, LONG_CPU, "blockwise", "8192 x 8192"),
    ({}, LONG_CPU._replace(length=512), "prefix", "512 tokens: blocks of queries"),
    ({"compute_dtype": "float32"}, LONG_CPU._replace(length=2048), "prefix", "2048 tokens: blocks of queries"),
    ({"head_dim": 32}, LONG_CPU._replace(length=512, training=False), "shifted", "heads of 32, no gradients"),
    ({"head_dim": 33}, LONG_CPU._replace(length=512, training=False), "prefix", "512 tokens"),
    ({"head_dim": 32}, LONG_CPU._replace(length=512), "prefix", "512 tokens"),
    (
        {"head_dim": 32, "attention_softcap": 50.0},
        LONG_CPU._replace(length=512, training=False),
        "prefix",
        "512 tokens",
    ),
    ({}, LONG_CPU._replace(length=2048), "blockwise", "2048 x 2048"),
    ({"dropout": 0.1}, LONG_CPU._replace(dropout=True), "reference", "dropout"),
    ({"dropout": 0.1}, LONG_CPU, "blockwise", "8192"),  # no dropout: an evaluation
    ({"attention_softcap": 50.0, "window": 64, "num_kv_heads": 2}, LONG_CPU, "blockwise", "8192"),
    ({}, H100, "cudnn", "dense mask"),
    ({}, H100._replace(segments=False), "cudnn", "fused kernel"),
    ({"window": 64, "num_kv_heads": 2}, H100, "cudnn", "fused kernel"),
    ({"attention_softcap": 50.0}, H100, "reference", "not cudnn: cuDNN has no cap"),
    ({"attention_softcap": 50.0}, H100._replace(length=4096), "blockwise", "not cudnn: cuDNN has no cap"),
    ({"compute_dtype": "float32"}, H100, "reference", "not cudnn: its products are in bfloat16"),
    ({"head_dim": 20}, H100, "reference", "multiple of 8"),
    ({"head_dim": 256}, H100, "cudnn", "fused kernel"),
    ({"head_dim": 256}, A100, "reference", "before Hopper"),
    ({}, V100, "reference", "compute capability 7.0"),
    ({}, AMD, "reference", "GPU of another kind"),
    ({}, H100._replace(length=1023), "reference", "even length"),
    ({}, H100._replace(length=1023, training=False), "cudnn", "fused kernel"),
    ({}, H100._replace(length=1023, segments=False), "cudnn", "fused kernel"),
    ({}, H100._replace(length=2 * LONGEST_DENSE), "blockwise", "dense mask"),
    ({"dropout": 0.1}, H100._replace(dropout=True), "reference", "model.dropout 0.1"),
    ({"attention_softcap": 50.0, "window": 64}, TPU, "splash", "fused kernel of TPUs"),
    ({"compute_dtype": "float32"}, TPU, "reference", "not splash"),
    ({}, H100._replace(source_length=513), "reference", "even length and these have 513"),
    ({}, CPU._replace(source_length=8192), "blockwise", "8192 x 8192"),
    ({"positions": "relative"}, LONG_CPU, "reference", "relative positions"),
    ({"positions": "relative"}, H100, "reference", "not cudnn: model.positions 'relative' adds to scores"),
    ({"positions": "relative"}, TPU, "reference", "not splash"),
    ({"attention": "reference"}, LONG_CPU, "reference", "says so"),
    ({"attention": "blockwise"}, H100, "blockwise", "says so"),
]


@pytest.mark.parametrize(("fields", "site", "name", "reason"), PICKED)
def test_choice(fields, site, name, reason):
    picked = choose(dataclasses.replace(MODEL, **fields), site)
    assert picked.name == name and reason in picked.reason, picked
    assert picked.name in BACKENDS


# (fields of the model, parts of the message)
REFUSED = [
    ({"attention": "blockwise", "dropout": 0.1}, ("'blockwise'", "model.dropout 0.1", "'reference'")),
    ({"attention": "splash", "dropout": 0.1}, ("'splash'", "model.dropout 0.1")),
    ({"attention": "splash", "compute_dtype": "float32"}, ("bfloat16", "'float32'")),
    ({"attention": "cudnn", "compute_dtype": "tensorfloat32"}, ("bfloat16", "'tensorfloat32'")),
    ({"attention": "cudnn", "attention_softcap": 50.0}, ("model.attention_softcap is 50.0", "'auto'")),
    ({"attention": "cudnn", "head_dim": 20}, ("multiple of 8", "20")),
    ({"attention": "cudnn", "head_dim": 264}, ("up to 256", "264")),
]


@pytest.mark.parametrize(("fields", "said"), REFUSED)
def test_a_config_that_the_back_end_can_not_honour_is_refused(fields, said):
    with pytest.raises(InputError) as error:
        validate(RunConfig(model=dataclasses.replace(MODEL, **fields)))
    assert all(part in str(error.value) for part in said), error.value
    auto = dataclasses.replace(MODEL, **{**fields, "attention": "auto"})
    validate(RunConfig(model=auto))  # the way out


@pytest.mark.parametrize(
    ("name", "site", "said"),
    [
        ("cudnn", CPU, "this is a cpu"),
        ("cudnn", TPU, "this is a tpu"),
        ("cudnn", V100, "compute capability 7.0"),
        ("cudnn", H100._replace(length=1023), "1023 tokens"),
        ("splash", H100, "this is a gpu"),
    ],
)
def test_a_device_that_the_back_end_does_not_run_on_is_refused(name, site, said):
    with pytest.raises(InputError, match=said):
        choose(dataclasses.replace(MODEL, attention=name), site)


def test_without_a_device_a_form_that_runs_on_all():
    assert unplaced(MODEL, 64, dropout=False) is attend
    assert unplaced(MODEL, 8192, dropout=False) is attend_blockwise
    assert unplaced(MODEL, 8192, dropout=True) is attend
