"""Model folders of Hugging Face: opened, scored, written, imported; what is wrong with one is said in one message."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lm
import train
from lm import __main__ as commands
from lm import checkpoint
from lm.config import InputError, ParallelConfig, RunConfig
from lm.data.tokenizer import ByteTokenizer
from lm.interop import huggingface
from lm.nn import language_model
from lm.nn.head import token_nll
from lm.parallel import make_mesh

from .conftest import tensors

STORIES = Path(__file__).parents[3] / "shared" / "data" / "stories260K"


def bytes_tokenizer(folder, **roles):
    """A byte-level tokenizer.json whose special tokens have names that say nothing, and a tokenizer_config.json."""
    described = json.loads(ByteTokenizer().content)
    for token in described["added_tokens"]:
        token["content"] = {256: "<first>", 257: "<second>"}[token["id"]]
    (folder.path / "tokenizer.json").write_text(json.dumps(described))
    if roles:
        (folder.path / "tokenizer_config.json").write_text(json.dumps(roles))
    return folder


def generation_config(folder, **ids):
    (folder.path / "generation_config.json").write_text(json.dumps(ids))


def test_opens_without_a_tokenizer(folder):
    run = lm.load(folder.path)
    assert (run.tokenizer, run.step, run.path) == (None, None, folder.path)
    assert run.config.data.context == 64
    assert {leaf.dtype for leaf in jax.tree.leaves(run.params)} == {np.dtype("float32")}
    assert run.num_parameters == sum(array.size for array in tensors().values())
    assert run(np.zeros((1, 3), np.int32)).shape == (1, 3, 259)
    with pytest.raises(InputError, match="has no tokenizer"):
        lm.generate(run, ["x"])
    for step in (7, "best"):
        with pytest.raises(InputError, match=f"no step {step}"):
            lm.load(folder.path, step=step)
    assert lm.load(folder.config(max_position_embeddings=4096).path).config.data.context == 1024


def test_a_vocabulary_that_the_mesh_does_not_divide_is_padded(folder):
    """259 ids over two devices: a row of zeros more, whose logit is -inf; the others within 1e-5."""
    ids, alone = np.arange(12, dtype=np.int32)[None], lm.load(folder.path)
    split = lm.load(folder.path, mesh=make_mesh(ParallelConfig(data=1, tensor=2)))
    table = split.params["embed"]["tokens"]
    assert table.shape[0] == 260 and table.addressable_shards[0].data.shape[0] == 130
    logits = np.asarray(split(ids))
    np.testing.assert_allclose(logits[..., :259], alone(ids), atol=1e-5)
    assert (logits[..., 259:] == -np.inf).all()


def test_dtypes(folder):
    """Whatever the files hold, parameters are float32, unless asked for otherwise."""
    exact = lm.load(folder.path)
    for dtype in ("bfloat16", "float16"):
        arrays = {name: array.astype(jnp.dtype(dtype)) for name, array in tensors().items()}
        rounded = lm.load(folder.weights(**arrays).path)
        up = rounded.params["layers"]["feed_forward"]["up"]
        assert up.dtype == np.float32
        assert np.array_equal(up[1], np.float32(arrays["model.layers.1.mlp.up_proj.weight"]).T)
    half = lm.load(folder.weights(**tensors()).path, dtype="bfloat16")
    assert half.config.model.compute_dtype == "bfloat16"
    jax.tree.map(
        np.testing.assert_array_equal, half.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact.params)
    )


def test_names_without_their_model_and_buffers(folder):
    """As LlamaModel saves itself, and with what old versions saved besides."""
    arrays = {name.removeprefix("model."): array for name, array in tensors().items()}
    arrays["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    plain = lm.load(folder.path)
    jax.tree.map(np.testing.assert_array_equal, lm.load(folder.weights(**arrays).path).params, plain.params)


def test_a_tied_head_may_be_in_the_files(folder):
    arrays = tensors()
    head = arrays.pop("lm_head.weight")
    folder.config(tie_word_embeddings=True).weights(**arrays)
    without = lm.load(folder.path)
    assert "head" not in without.params
    with_it = lm.load(folder.weights(**arrays, **{"lm_head.weight": arrays["model.embed_tokens.weight"]}).path)
    jax.tree.map(np.testing.assert_array_equal, with_it.params, without.params)
    with pytest.raises(InputError, match="lm_head.weight differs from embed_tokens.weight"):
        lm.load(folder.weights(**arrays, **{"lm_head.weight": head}).path)


def test_special_ids(folder):
    """tokenizer_config.json decides, then generation_config.json, then config.json."""

    def ids():
        tokenizer = lm.load(folder.path).tokenizer
        return tokenizer.bos, tokenizer.eos

    bytes_tokenizer(folder)
    assert ids() == (None, None)
    folder.config(bos_token_id=7, eos_token_id=[8, 9])
    assert ids() == (7, 8)
    generation_config(folder, bos_token_id=256, eos_token_id=257)
    assert ids() == (256, 257)
    bytes_tokenizer(folder, bos_token="<second>", eos_token=None)
    assert ids() == (257, None)
    bytes_tokenizer(folder, eos_token="<first>")
    generation_config(folder, bos_token_id=258)  # a row of the model, but no token
    with pytest.warns(UserWarning, match="bos_token_id 258 is not in the vocabulary"):
        assert ids() == (None, 256)


def test_tokens_without_a_row(folder):
    """Those that text is never made into don't matter."""
    arrays = tensors()
    arrays |= {name: arrays[name][:256] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    bytes_tokenizer(folder, bos_token="<first>", eos_token="Q").config(vocab_size=256).weights(**arrays)
    with pytest.warns(UserWarning, match="bos_token_id 256 is not in the vocabulary"):
        run = lm.load(folder.path)
    assert (run.tokenizer.bos, run.tokenizer.eos) == (None, ord("Q"))
    arrays |= {name: arrays[name][:200] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    with pytest.raises(
        InputError, match="has 258 tokens, the model embeds 200: it is another model's, or vocab_size is wrong"
    ):
        lm.load(folder.config(vocab_size=200).weights(**arrays).path)


def changed(change):
    arrays = tensors()
    change(arrays)
    return arrays


def set_number(value):
    def change(arrays):
        arrays["model.layers.1.mlp.up_proj.weight"][3, 4] = value

    return change


WRONG = {
    "missing": (
        lambda a: a.pop("model.layers.1.mlp.up_proj.weight"),
        "lacks 1 of the 21 .*layers.1.mlp.up_proj.weight",
    ),
    "no head": (lambda a: a.pop("lm_head.weight"), "lm_head.weight"),
    "unknown": (
        lambda a: a.update({"model.layers.2.mlp.up_proj.weight": np.ones(2)}),
        "no place for: layers.2.mlp.up_proj",
    ),
    "shape": (
        lambda a: a.update({"model.norm.weight": np.ones(15)}),
        r"norm.weight has shape \[15\], .* must be \[16\]",
    ),
    "nan": (set_number(np.nan), r"layers.1.mlp.up_proj.weight holds nan \(number 52 of 384\)"),
    "infinite": (set_number(-np.inf), "layers.1.mlp.up_proj.weight holds -inf"),
    "twice": (lambda a: a.update({"norm.weight": np.ones(16)}), "two tensors for norm.weight"),
    "integers": (lambda a: a.update({"model.norm.weight": np.ones(16, np.int32)}), "norm.weight is of dtype I32"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_wrong_weights_are_refused(change, message, folder):
    folder.weights(**changed(change))
    with pytest.raises(InputError, match=message):
        lm.load(folder.path)


def test_wrong_folders_are_refused(folder):
    (folder.path / "generation_config.json").write_text("{")
    bytes_tokenizer(folder)
    with pytest.raises(InputError, match="generation_config.json can't be read"):
        lm.load(folder.path)
    (folder.path / "generation_config.json").unlink()
    with pytest.raises(InputError, match="describes no model that can be built: .*num_kv_heads 3"):
        lm.load(folder.config(num_key_value_heads=3).path)
    (folder.path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="config.json is not a JSON object"):
        lm.load(folder.path)
    (folder.path / "config.json").unlink()
    with pytest.raises(InputError, match="has no config.json"):
        lm.load(folder.path)


def test_pickles_are_never_opened(folder):
    (folder.path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="has no weights"):
        lm.load(folder.path)
    (folder.path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match="never opened. Convert it"):
        lm.load(folder.path)


def test_export_and_back(folder, tmp_path):
    """The same arrays, without the rows of padding, and the same tokenizer with its special ids."""
    bytes_tokenizer(folder, bos_token="<second>", eos_token="<first>", pad_token="Q")
    run = lm.load(folder.path)
    huggingface.save(run, tmp_path / "out", max_shard_bytes=5000)
    back = lm.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, back.params, run.params)
    assert dataclasses.replace(back.config.model, head_dim=None) == run.config.model
    assert back.tokenizer.sha256 == run.tokenizer.sha256
    assert (back.tokenizer.bos, back.tokenizer.eos, back.tokenizer.pad) == (257, 256, ord("Q"))
    written = {path.name: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*config.json")}
    for name in ("config.json", "generation_config.json"):
        assert (written[name]["bos_token_id"], written[name]["eos_token_id"]) == (257, 256)
    roles = {role: written["tokenizer_config.json"][f"{role}_token"] for role in ("bos", "eos", "pad")}
    assert roles == {"bos": "<second>", "eos": "<first>", "pad": "Q"}
    with pytest.raises(InputError, match="not an empty folder"):
        huggingface.save(run, tmp_path / "out")
    with pytest.raises(InputError, match="dtype is 'int8'"):
        huggingface.save(run, tmp_path / "other", dtype="int8")


def test_the_commands(folder, tmp_path, capsys):
    """import gives a run that opens, export of it the same weights; a model of no family leaves nothing behind."""
    bytes_tokenizer(folder, bos_token="<first>", eos_token="<second>")
    commands.main(["import", str(folder.path), str(tmp_path / "run")])
    run, theirs = lm.load(tmp_path / "run"), lm.load(folder.path)
    jax.tree.map(np.testing.assert_array_equal, run.params, theirs.params)
    assert (run.step, run.tokenizer.bos, run.tokenizer.eos) == (0, 256, 257)
    assert run.config == theirs.config
    assert "checkpoints/0" in capsys.readouterr().out
    with pytest.raises(InputError, match="is not empty"):
        commands.main(["import", str(folder.path), str(tmp_path / "run")])
    (tmp_path / "text.txt").write_text("Some text to score. " * 20)
    source = f"text:{tmp_path}/text.txt"
    assert lm.evaluate(run, source).nats == lm.evaluate(theirs, source).nats
    commands.main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "bfloat16"])
    out = lm.load(tmp_path / "out")
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(np.float32), run.params)
    jax.tree.map(np.testing.assert_array_equal, out.params, rounded)
    model = dataclasses.replace(run.config.model, qk_norm=True, qkv_bias=True)
    nobody = dataclasses.replace(run, config=RunConfig(model=model))
    with pytest.raises(InputError, match="no Hugging Face family has this model"):
        huggingface.save(nobody, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_neither_torch_nor_transformers_is_imported(folder):
    theirs, ours = str(folder.path), str(folder.path / "out")
    script = (
        f"import sys; from lm.interop import huggingface; huggingface.save(huggingface.load({theirs!r}), {ours!r}); "
        "print([name for name in ('torch', 'transformers', 'tensorflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"needs the trained model at {STORIES}")
def test_a_trained_model_scores_as_transformers_says():
    """1.751215 nats a token over chunks of 511 ids, each behind BOS: transformers 5.23.0, float32."""
    run = lm.load(STORIES)
    ids = run.tokenizer.encode((STORIES / "stories.txt").read_text(encoding="utf-8"))
    rows = -(-len(ids) // 511)
    row_BT = np.full((rows, 512), run.tokenizer.bos, np.int32)
    weight_BT = np.zeros((rows, 511))
    for number in range(rows):
        chunk = ids[511 * number : 511 * (number + 1)]
        row_BT[number, 1 : 1 + len(chunk)] = chunk
        weight_BT[number, : len(chunk)] = 1

    @jax.jit
    def nll(params, row_T):
        return token_nll(language_model.apply(params, row_T[None, :-1], cfg=run.config.model), row_T[None, 1:])[0]

    nll_BT = np.stack([nll(run.params, row_T) for row_T in row_BT]).astype(np.float64)
    assert weight_BT.sum() == len(ids) == 29_767
    assert (nll_BT * weight_BT).sum() / len(ids) == pytest.approx(1.751215, abs=1e-5)


def test_an_import_that_is_interrupted_leaves_nothing(folder, tmp_path, monkeypatch):
    bytes_tokenizer(folder)
    command = ["import", str(folder.path), str(tmp_path / "there" / "run")]

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.CheckpointWriter, "save", interrupted)
        commands.main(command)
    assert not [*(tmp_path / "there").iterdir()]
    commands.main(command)
    assert lm.load(tmp_path / "there" / "run").num_parameters > 0
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is no folder that can be written to"):
        commands.main(["import", str(folder.path), str(tmp_path / "file" / "run")])


def test_a_run_goes_on_with_the_tokenizer_that_the_folder_has(folder, tmp_path):
    """Its names say nothing of BOS and EOS: config.json does."""
    bytes_tokenizer(folder)
    generation_config(folder, bos_token_id=256, eos_token_id=257)
    theirs = lm.load(folder.path)
    assert (theirs.tokenizer.bos, theirs.tokenizer.eos) == (256, 257)
    (tmp_path / "text.txt").write_text("Some text to go on with. " * 60)
    fields = {"data.train": f"text:{tmp_path}/text.txt", "data.context": 8, "training.batch_size": 8}
    fields |= {"training.steps": 2, "optimizer.learning_rate": 1e-9, "observe.sample_prompt": None}
    flags = [str(part) for name, value in fields.items() for part in (f"--{name}", value)]
    train.train(["tiny", "--workdir", str(tmp_path / "run"), "--init-from", str(folder.path), *flags])
    run = lm.load(tmp_path / "run")
    assert run.tokenizer.sha256 == theirs.tokenizer.sha256 and run.tokenizer.bos == 256
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), run.params, theirs.params)


def test_weights_that_float16_does_not_hold_are_refused(folder, tmp_path):
    run = lm.load(folder.path)
    run.params["norm"]["scale"] = run.params["norm"]["scale"] * 1e6
    with pytest.raises(InputError, match=r"reaches \d.*e.0\d, more than float16 holds: use bfloat16 or float32"):
        huggingface.save(run, tmp_path / "out", dtype="float16")
