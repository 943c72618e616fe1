"""Checkpoints: bit-exact on any topology, whole or absent after a kill, and self-contained."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm import checkpoint
from lm.config import InputError, ModelConfig, RunConfig
from lm.data import tokenizer
from lm.manifest import MANIFEST

ROOT = Path(__file__).parents[1]
LOSS = checkpoint.BEST


def params_like(seed=0):
    """Random bits in float32 and bfloat16, in the nested dicts of a model."""
    a, b, c = jax.random.split(jax.random.key(seed), 3)
    return {
        "embed": {"table": jax.random.normal(a, (16, 8))},
        "layers": {"w": jax.random.normal(b, (2, 8, 8), jnp.bfloat16), "scale": jax.random.normal(c, (2, 8))},
    }


def items_like(seed=0):
    """What training saves: parameters, the state of a real optimizer after an update, and a few numbers."""
    params = params_like(seed)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    _, opt_state = tx.update(params_like(seed + 1), tx.init(params), params)
    rest = {"step": jnp.int32(seed), "tokens": np.int64(2**40 + seed), "seconds": np.float64(0.1 + seed)}
    return {"params": params, "opt_state": opt_state, "rest": rest}


def abstract(tree):
    def leaf(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))

    return jax.tree.map(leaf, tree)


def assert_same_bits(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype, path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def writer(run, *, keep=None, config=None, save_tokenizer=None):
    return checkpoint.CheckpointWriter(
        run, config=config or RunConfig(), save_tokenizer=save_tokenizer, provenance={"data_sha256": "abc"}, keep=keep
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of one checkpoint, to read only."""
    run = tmp_path_factory.mktemp("run")
    with writer(run, save_tokenizer=tokenizer.ByteTokenizer().save) as w:
        w.save(7, items_like(7), {LOSS: 2.5})
    return run


def test_everything_comes_back_bit_for_bit(saved):
    items = items_like(7)
    restored = checkpoint.restore(checkpoint.locate(saved), abstract(items))
    assert_same_bits(restored, items)
    assert isinstance(restored["rest"]["seconds"], np.ndarray)  # as a jax.Array it would be float32


def test_params_open_with_the_path_alone(saved):
    params = params_like(7)
    assert_same_bits(checkpoint.restore_params(checkpoint.locate(saved)), params)
    cast = checkpoint.restore_params(checkpoint.locate(saved), dtype=jnp.bfloat16)
    assert_same_bits(cast, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def test_manifest_lists_every_file_and_says_where_it_comes_from(saved):
    folder = checkpoint.locate(saved)
    manifest = checkpoint.read_manifest(folder)
    assert (manifest.step, manifest.metrics, manifest.provenance) == (7, {LOSS: 2.5}, {"data_sha256": "abc"})
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert MANIFEST in present
    assert present - set(manifest.files) <= {MANIFEST, "_CHECKPOINT_METADATA", "commit_success.txt"}  # Orbax's notes
    assert {"config.json", "tokenizer.json", "params/manifest.ocdbt"} < set(manifest.files)
    assert checkpoint.verify(folder) == []
    assert (saved / "config.json").read_text() == (folder / "config.json").read_text()
    assert (saved / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()


def test_every_changed_byte_is_found_and_nothing_damaged_is_read(saved, tmp_path):
    """Without the checksums a flipped bit in an array is read as a number, with no error."""
    folder = shutil.copytree(checkpoint.locate(saved), tmp_path / "copy")
    items = abstract(items_like(7))
    for name in [*checkpoint.read_manifest(folder).files, MANIFEST]:
        path = folder / name
        original = path.read_bytes()
        damaged = bytearray(original)
        damaged[len(damaged) // 2] ^= 0x10
        path.write_bytes(damaged)
        assert any(MANIFEST in problem or problem.startswith(name) for problem in checkpoint.verify(folder)), name
        if name.split("/")[0] in items:
            with pytest.raises(InputError, match=f"copy is damaged: {name}"):
                checkpoint.restore(folder, items)
        if name.split("/")[0] in ("params", "config.json", "tokenizer.json", MANIFEST):
            with pytest.raises(InputError):
                checkpoint.load(folder)
        path.write_bytes(original)
    (folder / "config.json").unlink()
    with (folder / "params/_METADATA").open("a") as file:
        file.write(" ")
    assert len(checkpoint.verify(folder)) == 2


def test_a_copied_checkpoint_opens_alone(saved, tmp_path):
    copy = shutil.copytree(checkpoint.locate(saved), tmp_path / "elsewhere" / "my-model")
    loaded = checkpoint.load(copy)
    assert (loaded.step, loaded.path, loaded.config) == (7, copy, RunConfig())
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("hé")) == "hé"
    assert loaded.num_parameters == 16 * 8 + 2 * 64 + 2 * 8
    assert_same_bits(loaded.params, params_like(7))
    with pytest.raises(InputError, match="one checkpoint, of step 7, not 8"):
        checkpoint.load(copy, step=8)


def test_a_sentencepiece_model_is_kept_as_its_own_file(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ab ba"] * 9), model_writer=content, vocab_size=7, minloglevel=2
    )
    model = tokenizer.SentencePieceTokenizer(content.getvalue())
    with writer(tmp_path, save_tokenizer=model.save) as w:
        w.save(1, items_like(1))
    folder = checkpoint.locate(tmp_path)
    assert "tokenizer.model" in checkpoint.read_manifest(folder).files
    assert checkpoint.load(folder).tokenizer.sha256 == model.sha256
    (folder / "tokenizer.model").write_bytes(content.getvalue()[:-1])
    with pytest.raises(InputError, match="is damaged: tokenizer.model"):
        checkpoint.load(folder)


def test_loaded_computes_what_the_model_does_and_compiles_once(tmp_path):
    config = RunConfig(model=ModelConfig(num_layers=1, d_model=8, num_heads=2, vocab_size=11, max_positions=4))
    loaded = checkpoint.Loaded(config, {}, None, None, tmp_path)
    tokens_BT = jnp.arange(8).reshape(2, 4)
    params = loaded.model.init(jax.random.key(0), tokens_BT)["params"]
    loaded = dataclasses.replace(loaded, params=params)
    logits_BTV = loaded(np.asarray(tokens_BT))
    # 1e-5: compiled whole or run op by op, sums may be taken in another order
    np.testing.assert_allclose(logits_BTV, loaded.model.apply({"params": params}, tokens_BT), rtol=1e-5, atol=1e-5)
    loaded(tokens_BT)
    assert loaded._forward._cache_size() == 1


def test_the_arrays_may_be_donated_right_after_save(tmp_path):
    """The step that follows overwrites the buffers while they are being written."""
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    state = {"w": jnp.arange(4_000_000, dtype=jnp.float32)}
    rest = {"seconds": np.arange(100_000.0)}
    wanted = jax.tree.map(lambda x: np.array(x, copy=True), {"params": state, "rest": rest})
    with writer(tmp_path) as w:
        w.save(1, {"params": state, "rest": rest})
        rest["seconds"][:] = -1
        for _ in range(3):
            state = update(state)
        jax.block_until_ready(state)
    restored = checkpoint.restore(
        checkpoint.locate(tmp_path), jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), wanted)
    )
    assert_same_bits(restored, wanted)


def test_another_structure_names_the_leaves(saved):
    wanted = abstract(items_like(7)["params"])
    wanted["layers"]["bias"] = wanted["layers"].pop("scale")
    wanted["layers"]["w"] = jax.ShapeDtypeStruct((2, 8, 9), jnp.bfloat16)
    with pytest.raises(InputError) as raised:
        checkpoint.restore(checkpoint.locate(saved), {"params": wanted})
    message = str(raised.value)
    assert "layers/scale: saved float32[2, 8], wanted -" in message
    assert "layers/bias: saved -, wanted float32[2, 8]" in message
    assert "layers/w: saved bfloat16[2, 8, 8], wanted bfloat16[2, 8, 9]" in message
    with pytest.raises(InputError, match="float32.*wanted float16"):
        checkpoint.restore(
            checkpoint.locate(saved), {"params": jax.tree.map(lambda x: x.update(dtype=jnp.float16), wanted)}
        )
    with pytest.raises(InputError, match="no 'averages'"):
        checkpoint.restore(checkpoint.locate(saved), {"averages": wanted})


@pytest.mark.parametrize(
    ("keep", "losses", "kept"),
    [
        (2, {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.0}, [2, 3, 4]),
        (1, {1: 3.0, 2: None, 3: None, 4: None}, [1, 4]),
        (1, {1: None, 2: float("nan"), 3: None}, [3]),
        (1, {1: 2.0, 2: 2.0, 3: 2.0}, [1, 3]),
        (None, {1: 3.0, 2: 1.0, 3: 2.0}, [1, 2, 3]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, keep, losses, kept):
    with writer(tmp_path, keep=keep) as w:
        for step, loss in losses.items():
            w.save(step, {"params": params_like()}, None if loss is None else {LOSS: loss})
    assert checkpoint.steps(tmp_path) == kept
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == sorted(map(str, kept))


def test_saving_a_step_again_adds_metrics_and_writes_no_array(tmp_path):
    with writer(tmp_path, keep=1) as w:
        w.save(1, {"params": params_like(1)})
        w.save(1, {"params": params_like(2)}, {LOSS: 2.0})
    assert_same_bits(checkpoint.restore_params(checkpoint.locate(tmp_path, "best")), params_like(1))
    assert checkpoint.verify(checkpoint.locate(tmp_path)) == []


def test_foreign_folders_and_leftovers(tmp_path):
    """Folders that aren't checkpoints are neither read nor harmed; what a killed writer left is removed."""
    folder = tmp_path / "checkpoints"
    for name in ("0010", "20", "notes", "5.orbax-checkpoint-tmp", "4.deleting"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text("mine")
    assert checkpoint.steps(tmp_path) == []
    with writer(tmp_path, keep=1) as w:
        for step in (1, 30):
            w.save(step, {"params": params_like()})
        with pytest.raises(InputError, match="20 is in the way"):
            w.save(20, {"params": params_like()})
    assert checkpoint.steps(tmp_path) == [30]
    assert {entry.name for entry in folder.iterdir()} == {"0010", "20", "notes", "30"}
    assert (folder / "20" / "file").read_text() == "mine"


def test_a_failed_save_is_raised_and_leaves_the_run_as_it_was(tmp_path, monkeypatch):
    w = writer(tmp_path, keep=1)
    w.save(1, {"params": params_like()})
    w.wait()
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_manifest", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
        w.save(2, {"params": params_like()})
        with pytest.raises(OSError, match="disk full"):
            w.wait()
    assert checkpoint.steps(tmp_path) == [1]
    w.save(2, {"params": params_like()})
    w.close()
    assert checkpoint.steps(tmp_path) == [2]


def test_wrong_paths_say_what_is_there(saved, tmp_path):
    (tmp_path / "model.bin").touch()
    for path, words in (
        (tmp_path / "nowhere", "it does not exist"),
        (tmp_path / "model.bin", "it is a file"),
        (tmp_path, "it holds model.bin"),
    ):
        with pytest.raises(InputError, match=f"{path} is not a run: .*{words}"):
            checkpoint.locate(path)
    for step in (8, "newest"):
        with pytest.raises(InputError, match=f"no checkpoint {step}: use latest, best or one of the steps 7"):
            checkpoint.locate(saved, step)
    assert checkpoint.locate(saved, "7") == checkpoint.locate(saved, "best") == checkpoint.locate(saved, 7)
    with writer(tmp_path / "run") as w:
        pass
    with pytest.raises(InputError, match="no complete checkpoint"):
        checkpoint.locate(tmp_path / "run")
    with writer(tmp_path / "run") as w:
        w.save(1, {"params": params_like()})
    with pytest.raises(InputError, match="none is the best"):
        checkpoint.locate(tmp_path / "run", "best")
    assert (checkpoint.latest_step(tmp_path / "run"), checkpoint.best_step(tmp_path / "run")) == (1, None)


def test_a_config_of_another_schema_is_refused(saved, tmp_path):
    config = json.loads((saved / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "schema_version": 99}))
    with pytest.raises(InputError, match=f"{tmp_path}.*schema_version 99"):
        checkpoint.read_config(tmp_path)


def python(code, *arguments, devices=1):
    """Starts Python on `code` with that many fake devices."""
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


SHARDED = """
    import sys
    import jax, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from lm import checkpoint
    from lm.config import RunConfig
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    over_both, over_fsdp = NamedSharding(mesh, P("data", "fsdp")), NamedSharding(mesh, P("fsdp"))
    everywhere = NamedSharding(mesh, P())
    tree = {"a": jax.device_put(np.arange(64, dtype=np.float32).reshape(8, 8) / 7, over_both),
            "b": jax.device_put(np.arange(8, dtype=np.float32) / 3, over_fsdp),
            "c": jax.device_put(np.float32(1) / 9, everywhere)}
"""
PLAIN = {"a": np.arange(64, dtype=np.float32).reshape(8, 8) / 7, "b": np.arange(8, dtype=np.float32) / 3}
PLAIN["c"] = np.float32(1) / 9


def test_eight_devices_and_one_read_each_other(tmp_path):
    with writer(tmp_path / "one") as w:
        w.save(1, {"params": jax.tree.map(jnp.asarray, PLAIN)})
    code = """
    about = {"config": RunConfig(), "save_tokenizer": None, "provenance": {}, "keep": None}
    with checkpoint.CheckpointWriter(sys.argv[2], **about) as w:
        w.save(1, {"params": tree})
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
    got = checkpoint.restore(checkpoint.locate(sys.argv[1]), {"params": wanted})["params"]
    for name, leaf in got.items():
        assert leaf.sharding == tree[name].sharding and len(leaf.sharding.device_set) == 8, name
        assert np.asarray(leaf).tobytes() == np.asarray(tree[name]).tobytes(), name
    """
    process = python(SHARDED + code, tmp_path / "one", tmp_path / "eight", devices=8)
    assert process.communicate() == ("", "") and process.returncode == 0  # and Orbax keeps quiet
    folder = checkpoint.locate(tmp_path / "eight")
    assert_same_bits(checkpoint.restore_params(folder), PLAIN)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jnp.zeros(()).sharding), PLAIN)
    assert_same_bits(checkpoint.restore(folder, {"params": one})["params"], PLAIN)


def test_killed_at_any_moment_a_step_is_whole_or_absent(tmp_path):
    """SIGKILL at moments spread over many saves: every step that can be seen verifies, and the next writer goes on."""
    code = """
    import sys
    import jax.numpy as jnp
    from lm import checkpoint
    from lm.config import RunConfig
    w = checkpoint.CheckpointWriter(sys.argv[1], config=RunConfig(), save_tokenizer=None, provenance={}, keep=2)
    first = (checkpoint.latest_step(sys.argv[1]) or 0) + 1
    for step in range(first, 10_000):
        w.save(step, {"params": {"w": jnp.full((100_000,), step)}, "rest": {"step": jnp.int32(step)}})
        print(step, flush=True)
    """
    reached = 0
    for moment in (0.0, 0.013, 0.031, 0.057, 0.071):
        process = python(code, tmp_path)
        for _ in range(4):
            process.stdout.readline()
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        present = checkpoint.steps(tmp_path)
        assert present[-1] > reached and len(present) <= 4, present
        reached = present[-1]
        for step in present:
            folder = checkpoint.locate(tmp_path, step)
            assert checkpoint.verify(folder) == []
            assert np.unique(checkpoint.restore_params(folder)["w"]) == [step]
    with writer(tmp_path, keep=2) as w:
        w.save(reached + 1, {"params": {"w": jnp.zeros(3)}})
    assert all(entry.name.isdecimal() for entry in (tmp_path / "checkpoints").iterdir())
