"""Eight fake devices in one process, strict shapes, and a cache of its own for every run of the tests."""

from __future__ import annotations

import os

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
# Compiling is most of the time here. The commands in tests/end_to_end run as a user's do, without this.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax  # noqa: E402
import pytest  # noqa: E402
from xdist.scheduler import LoadScopeScheduling  # noqa: E402

from lm.config import ModelConfig, RunConfig  # noqa: E402

# The shapes of model that the presets are made of, small; every test of the model runs over them.
SHAPES = {
    "gpt2": ModelConfig(num_layers=2, d_model=32, num_heads=4, bias=True, activation="gelu_tanh", vocab_multiple=8),
    "llama": ModelConfig(
        num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, norm="rmsnorm", activation="swiglu", d_ff=48,
        positions="rotary", tie_embeddings=False, vocab_multiple=1,
    ),
    "modern": ModelConfig(
        num_layers=2, d_model=32, num_heads=4, norm="rmsnorm", activation="relu2", positions="rotary", qk_norm=True,
        logit_softcap=15.0, head_dim=12,
    ),
    "tutorial": ModelConfig(
        num_layers=2, d_model=32, num_heads=2, norm_position="post", activation="relu", positions="sinusoidal",
        tie_embeddings=False, bias=True, head_bias=True, embedding_scale=True, hidden_dropout=True, initializer="torch",
    ),
    "gemma": ModelConfig(
        num_layers=3, d_model=32, num_heads=4, num_kv_heads=2, head_dim=10, norm="rmsnorm", norm_position="both",
        norm_offset=True, activation="geglu", d_ff=48, positions="rotary", rotary_base=(100.0, 10_000.0),
        rotary_factor=(1.0, 4.0), window=(4, None), attention_scale=0.4, attention_softcap=2.0, qk_norm=True,
        qkv_bias=True, embedding_scale=True,
    ),
    "bare": ModelConfig(num_layers=2, d_model=32, num_heads=2, activation="gelu", positions="none", vocab_multiple=1),
}  # fmt: skip
# Encoder–decoders, one for each kind of positions, and the norms, heads and tables that go with them.
PAIR_SHAPES = {
    "transformer": ModelConfig(
        family="encoder_decoder", num_layers=2, encoder_layers=3, d_model=32, num_heads=4, norm_position="post",
        activation="relu", positions="sinusoidal", bias=True, embedding_scale=True, initializer="torch",
    ),
    "t5": ModelConfig(
        family="encoder_decoder", num_layers=2, d_model=32, num_heads=4, head_dim=6, norm="rmsnorm", activation="geglu",
        d_ff=48, positions="relative", relative_buckets=8, relative_max_distance=12, attention_scale=1.0,
        logit_scale=0.5, hidden_dropout=True, vocab_multiple=8,
    ),
    "bart": ModelConfig(
        family="encoder_decoder", num_layers=3, encoder_layers=2, d_model=32, num_heads=2, bias=True, head_bias=True,
        share_embeddings=False, source_vocab_size=47, vocab_multiple=8,
    ),
    "grouped": ModelConfig(
        family="encoder_decoder", num_layers=3, d_model=32, num_heads=4, num_kv_heads=2, head_dim=10, norm="rmsnorm",
        norm_position="both", norm_offset=True, activation="swiglu", d_ff=48, positions="rotary",
        rotary_base=(100.0, 10_000.0), window=(3, None), attention_softcap=2.0, qk_norm=True, qkv_bias=True,
        tie_embeddings=False, share_embeddings=False, source_vocab_size=47, vocab_multiple=8,
    ),
}  # fmt: skip
VOCABULARY = 61


# Files whose tests are processes of their own: one after another, beside the other files.
PROCESSES = ("end_to_end", "processes", "test_processes.py", "test_examples.py", "test_launch.py", "test_task_run.py")


def pytest_xdist_make_scheduler(config, log):
    """Workers take whole files, whose tests share what they compile and make."""

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return "processes" if any(name in PROCESSES for name in file.split("/")) else file

    return ByFile(config, log)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """$LM_CACHE: what an earlier version or another test left behind must not be found."""
    os.environ["LM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(params=sorted(SHAPES))
def model(request) -> ModelConfig:
    """A resolved model config of every shape, with room for 32 positions."""
    return resolved(SHAPES[request.param])


@pytest.fixture(params=sorted(PAIR_SHAPES))
def pair_model(request) -> ModelConfig:
    """The same of the encoder–decoders."""
    return resolved(PAIR_SHAPES[request.param])


def resolved(model: ModelConfig) -> ModelConfig:
    """With a vocabulary of 61 and 32 positions: neither is a multiple of anything. Sources have their own tokens."""
    return RunConfig(model=model).resolve(VOCABULARY, model.source_vocab_size).model


@pytest.fixture(scope="session")
def one_device():
    """A mesh of a single device."""
    from lm.config import ParallelConfig
    from lm.parallel import make_mesh

    return make_mesh(ParallelConfig(), jax.devices()[:1])
