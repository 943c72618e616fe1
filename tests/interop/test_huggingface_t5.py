"""Folders of T5, Flan-T5 and mT5: opened, imported, gone on from, written; what is wrong with one is said by name."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

import lm
from lm import __main__ as commands
from lm import checkpoint
from lm.config import InputError, ParallelConfig
from lm.data.tokenizer import ByteTokenizer
from lm.interop import huggingface, huggingface_tokenizer
from lm.interop.huggingface_config import arithmetic, read, write
from lm.nn import params as declare
from lm.nn.language_model import model_specs
from lm.parallel import make_mesh
from tests.conftest import PAIR_SHAPES, resolved

from .conftest import Folder

CONFIG = {
    **{"model_type": "t5", "vocab_size": 259, "d_model": 16, "d_kv": 5, "d_ff": 24, "num_heads": 2, "num_layers": 2},
    **{"num_decoder_layers": 1, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20},
    **{"feed_forward_proj": "relu", "is_encoder_decoder": True, "n_positions": 48, "torch_dtype": "float32"},
    **{"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 257, "architectures": ["T5WithLMHeadModel"]},
}
FLAN = {
    **{"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "is_gated_act": True},
    **{"dense_act_fn": "gelu_new", "architectures": ["T5ForConditionalGeneration"]},
}
HEAD = "lm_head.weight"


def tensors(config=CONFIG):
    """The weights of a T5, drawn."""
    D, F, NH = config["d_model"], config["d_ff"], config["num_heads"] * config["d_kv"]
    gated = config["feed_forward_proj"].startswith("gated")
    shapes = {"shared.weight": (config["vocab_size"], D)}
    for side, layers in (("encoder", config["num_layers"]), ("decoder", config["num_decoder_layers"])):
        bias = (config["relative_attention_num_buckets"], config["num_heads"])
        shapes[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = bias
        shapes[f"{side}.final_layer_norm.weight"] = (D,)
        blocks = ["SelfAttention", "EncDecAttention"] if side == "decoder" else ["SelfAttention"]
        for i in range(layers):
            for number, block in enumerate(blocks):
                at = f"{side}.block.{i}.layer.{number}"
                shapes |= {f"{at}.{block}.{letter}.weight": (NH, D) for letter in "qkv"}
                shapes |= {f"{at}.{block}.o.weight": (D, NH), f"{at}.layer_norm.weight": (D,)}
            at = f"{side}.block.{i}.layer.{len(blocks)}"
            shapes |= {
                f"{at}.DenseReluDense.{name}.weight": (F, D) for name in (("wi_0", "wi_1") if gated else ("wi",))
            }
            shapes |= {f"{at}.DenseReluDense.wo.weight": (D, F), f"{at}.layer_norm.weight": (D,)}
    if config.get("tie_word_embeddings") is False:
        shapes[HEAD] = (config["vocab_size"], D)
    generator = np.random.default_rng(0)
    return {name: generator.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


class T5Folder(Folder):
    def __init__(self, path, **fields):
        self.path, self.fields = path, {**CONFIG, **fields}
        path.mkdir()
        self.config(**self.fields)
        self.weights(**tensors(self.fields))
        described = json.loads(ByteTokenizer().content)
        for token in described["added_tokens"]:
            token["content"] = {256: "<pad>", 257: "</s>"}[token["id"]]
        (path / "tokenizer.json").write_text(json.dumps(described))


@pytest.fixture
def t5(tmp_path):
    return T5Folder(tmp_path / "t5")


@pytest.fixture
def flan(tmp_path):
    return T5Folder(tmp_path / "flan", **FLAN)


@pytest.fixture
def pairs(tmp_path):
    lines = [f"source number {number} of them\tle texte {number * 7}\n" for number in range(40)]
    (tmp_path / "pairs.tsv").write_text("".join(lines))
    return f"pairs:{tmp_path}/pairs.tsv"


def same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_opens_and_says_nothing(t5, flan):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runs = [lm.load(folder.path) for folder in (t5, flan)]
    for run, folder in zip(runs, (t5, flan), strict=True):
        cfg = run.config.model
        assert (cfg.family, cfg.source_layers, cfg.num_layers, cfg.head_width) == ("encoder_decoder", 2, 1, 5)
        assert (cfg.start_id, run.tokenizer.eos, run.tokenizer.pad, run.tokenizer.bos) == (0, 257, 256, None)
        assert run.config.data.context == 48
        assert run.num_parameters == sum(array.size for array in tensors(folder.fields).values())
        ids = np.arange(10, dtype=np.int32)[None]
        assert run(ids[:, :3], source=ids).shape == (1, 3, 259)
    assert [run.config.model.activation for run in runs] == ["relu", "geglu"]
    assert [run.config.model.logit_scale for run in runs] == [0.25, None]
    assert [run.config.model.tie_embeddings for run in runs] == [True, False]


REFUSED = {
    "activation": ({"feed_forward_proj": "gated-relu"}, "feed_forward_proj 'gated-relu' is not implemented"),
    "gate": ({**FLAN, "is_gated_act": False}, "is_gated_act False contradicts feed_forward_proj 'gated-gelu'"),
    "name": ({**FLAN, "dense_act_fn": "gelu"}, "dense_act_fn 'gelu' contradicts feed_forward_proj 'gated-gelu'"),
    "encoder": ({"architectures": ["T5EncoderModel"]}, "architectures ['T5EncoderModel'] says that this is an encoder"),
    "old encoder": ({"is_encoder_decoder": False}, "is_encoder_decoder False says that this is an encoder alone"),
    "start": ({"decoder_start_token_id": 259}, "decoder_start_token_id 259 is not in the vocabulary of 259"),
    "layers": ({"num_decoder_layers": 0}, "num_decoder_layers is 0, not a number of layers"),
    "type": ({"d_kv": "5"}, "d_kv is '5', it must be of type int"),
    "buckets": ({"relative_attention_num_buckets": 2}, "relative_attention_num_buckets 2 is less than 4"),
    "distance": ({"relative_attention_max_distance": 4}, "relative_attention_max_distance 4 is not from 5"),
    "no distance": ({"relative_attention_max_distance": 10**12}, "relative_attention_max_distance 1000000000000"),
    "no width": ({"d_model": 0}, "holds a value that no model can have"),
    "umt5": ({"model_type": "umt5"}, "model_type 'umt5' has a relative bias in every layer"),
    "bart": ({"model_type": "bart"}, "model_type 'bart' is not implemented; of encoder-decoders lm opens"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_change_the_result_is_refused(fields, message):
    with pytest.raises(InputError) as raised:
        read({**CONFIG, **fields}, "config.json")
    assert str(raised.value).startswith("config.json")
    assert message in str(raised.value)


def test_both_versions_of_transformers():
    """Version 5 writes tie_word_embeddings true everywhere, and apart whether what the head reads is scaled."""

    def model(**fields):
        return read({**CONFIG, **fields}, "")[1]

    assert model(tie_word_embeddings=True, scale_decoder_outputs=True) == model() == model(tie_word_embeddings=True)
    assert model(scale_decoder_outputs=False) == dataclasses.replace(model(), logit_scale=None)
    untied = model(tie_word_embeddings=False)
    assert untied == dataclasses.replace(model(), logit_scale=None, tie_embeddings=False)
    assert model(model_type="mt5", scale_decoder_outputs=True).logit_scale is None
    assert model(num_decoder_layers=None).num_layers == 2
    assert model(decoder_start_token_id=None, pad_token_id=3).start_id == 3


def test_tables_that_are_in_the_files_besides(t5, flan):
    """Both sides', a tied head's, and a bias that version 2 saved and nothing reads."""
    arrays, plain = tensors(), lm.load(t5.path)
    table = arrays["shared.weight"]
    copies = {f"{side}.embed_tokens.weight": table for side in ("encoder", "decoder")} | {HEAD: table}
    unused = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": np.ones((8, 2), np.float32)}
    same(lm.load(t5.weights(**arrays, **copies, **unused).path).params, plain.params)
    del arrays["shared.weight"]
    same(lm.load(t5.weights(**arrays, **copies).path).params, plain.params)
    wrong = {**copies, "decoder.embed_tokens.weight": table + 1}
    with pytest.raises(InputError, match=r"decoder.embed_tokens.weight differs from shared.weight: the two sides"):
        lm.load(t5.weights(**arrays, **wrong).path)
    # of an own head version 5 says tie_word_embeddings true; the numbers decide
    own = lm.load(flan.path)
    flan.config(tie_word_embeddings=True, scale_decoder_outputs=False)
    again = lm.load(flan.path)
    assert again.config == own.config
    same(again.params, own.params)


WRONG = {
    "missing": (
        lambda a: a.pop("encoder.block.1.layer.0.SelfAttention.k.weight"),
        "lacks 1 of the 34 .*SelfAttention.k",
    ),
    "gate": (lambda a: a.update({"encoder.block.0.layer.1.DenseReluDense.wi_0.weight": np.ones((24, 16))}), "wi_0"),
    "layer": (
        lambda a: a.update({"decoder.block.1.layer.0.layer_norm.weight": np.ones(16)}),
        "no place for: decoder.bl",
    ),
    "shape": (
        lambda a: a.update({"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": np.ones((32, 2))}),
        r"relative_attention_bias.weight has shape \[32, 2\], by the config it must be \[8, 2\]",
    ),
    "nan": (lambda a: a["shared.weight"].fill(np.nan), "shared.weight holds nan"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_wrong_weights_are_refused(change, message, t5):
    arrays = tensors()
    change(arrays)
    with pytest.raises(InputError, match=message):
        lm.load(t5.weights(**arrays).path)


def test_a_model_split_over_devices(t5):
    """Heads, their biases, feed-forward and the one table of both sides, over two devices; within 1e-5 of one."""
    alone, split = lm.load(t5.path), lm.load(t5.path, mesh=make_mesh(ParallelConfig(data=1, tensor=2)))
    assert split.params["encoder"]["relative"].addressable_shards[0].data.shape == (8, 1)
    assert split.params["embed"]["tokens"].shape == (260, 16)
    ids = np.arange(12, dtype=np.int32)[None]
    logits = np.asarray(split(ids[:, :5], source=ids))
    np.testing.assert_allclose(logits[..., :259], alone(ids[:, :5], source=ids), atol=1e-5)
    assert (logits[..., 259:] == -np.inf).all()


def test_a_pickle_is_named_with_the_class_that_opens_it(t5):
    (t5.path / "model.safetensors").rename(t5.path / "pytorch_model.bin")
    with pytest.raises(InputError, match="never opened. Convert it .*AutoModelForSeq2SeqLM"):
        lm.load(t5.path)


def test_where_targets_start(t5):
    """config.json or generation_config.json says it, else it is the padding; the two may not differ."""
    generation = t5.path / "generation_config.json"
    generation.write_text(json.dumps({"decoder_start_token_id": 5}))
    assert lm.load(t5.config(decoder_start_token_id=None).path).config.model.start_id == 5
    with pytest.raises(InputError, match="decoder_start_token_id 3 contradicts 5 in generation_config.json"):
        lm.load(t5.config(decoder_start_token_id=3).path)
    generation.unlink()
    assert lm.load(t5.path).config.model.start_id == 3
    assert lm.load(t5.config(decoder_start_token_id=None, pad_token_id=9).path).config.model.start_id == 9


def test_the_commands(t5, flan, tmp_path, capsys):
    """import makes a run that opens, export of it the folder again."""
    for folder in (t5, flan):
        name = folder.path.name
        commands.main(["import", str(folder.path), str(tmp_path / f"run-{name}")])
        assert "--data pairs:FILE.tsv" in capsys.readouterr().out
        run, theirs = lm.load(tmp_path / f"run-{name}"), lm.load(folder.path)
        same(run.params, theirs.params)
        assert run.config == theirs.config
        assert run.tokenizer.sha256 == theirs.tokenizer.sha256 and run.tokenizer.eos == 257
        commands.main(["export", str(tmp_path / f"run-{name}"), str(tmp_path / f"out-{name}")])
        out = lm.load(tmp_path / f"out-{name}")
        same(out.params, theirs.params)
        assert arithmetic(out.config.model) == arithmetic(theirs.config.model)
        assert (out.config.model.start_id, out.tokenizer.eos, out.tokenizer.pad) == (0, 257, 256)
        written = json.loads((tmp_path / f"out-{name}" / "config.json").read_text())
        assert {name: written[name] for name in ("model_type", "num_layers", "num_decoder_layers", "d_kv")} == {
            **{"model_type": "t5", "num_layers": 2, "num_decoder_layers": 1, "d_kv": 5}
        }
        assert (written["decoder_start_token_id"], written["pad_token_id"], written["eos_token_id"]) == (0, 256, 257)
    with pytest.raises(InputError, match="t5 doesn't have this model|mt5 doesn't have this model"):
        commands.main(["export", str(t5.path), str(tmp_path / "other"), "--family", "mt5"])
    assert not (tmp_path / "other").exists()


def test_a_bad_folder_ends_with_status_2(t5, tmp_path):
    t5.config(feed_forward_proj="gated-relu")
    command = [sys.executable, "-m", "lm", "import", str(t5.path), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "feed_forward_proj 'gated-relu' is not implemented" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_neither_torch_nor_transformers_is_imported(t5):
    theirs, ours = str(t5.path), str(t5.path / "out")
    script = (
        f"import sys; from lm.interop import huggingface; huggingface.save(huggingface.load({theirs!r}), {ours!r}); "
        "print([name for name in ('torch', 'transformers', 'tensorflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("shape", PAIR_SHAPES)
def test_the_family_of_a_model(shape):
    """Of ours only what T5 has is written as one; else the fields that it hasn't are named."""
    cfg = dataclasses.replace(resolved(PAIR_SHAPES[shape]), start_id=0)
    if shape == "t5":
        cfg = dataclasses.replace(cfg, logit_scale=cfg.d_model**-0.5)
        family, fields = write(cfg)
        assert family.model_type == "t5"
        assert arithmetic(read(fields, "")[1]) == arithmetic(cfg)
        return
    with pytest.raises(InputError) as raised:
        write(cfg)
    fields = {"transformer": "model.norm_position 'post'", "bart": "model.share_embeddings False"}
    assert fields.get(shape, "model.positions 'rotary'") in str(raised.value)


def test_the_preset_is_t5_small():
    """60,506,624 parameters, as the published one has; written as the defaults of the family say."""
    config = lm.preset("t5_small").resolve(32_128, first_id=0)
    assert declare.count(model_specs(config.model)) == 60_506_624
    family, fields = write(config.model)
    assert family.model_type == "t5"
    assert arithmetic(read({"model_type": "t5"}, "")[1]) == arithmetic(config.model)
    assert {name: fields[name] for name in family.defaults if name in fields} == {
        name: value for name, value in family.defaults.items() if name in fields
    }


def test_a_start_that_nothing_says(t5, tmp_path):
    run = lm.load(t5.path)
    model = dataclasses.replace(run.config.model, start_id=None)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, model=model), tokenizer=None)
    with pytest.raises(InputError, match="model.start_id is None, and there is no tokenizer"):
        huggingface.save(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sources_and_targets_are_ended_by_the_tokenizer_of_the_folder(t5, tmp_path):
    """In what is written, so that others end their texts as we do; ours adds EOS itself, once."""
    from tokenizers import Tokenizer

    run = lm.load(t5.path)
    huggingface.save(run, tmp_path / "out")
    library = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert library.encode("ab").ids == [97, 98, 257]
    again = lm.load(tmp_path / "out").tokenizer
    assert again.encode("ab").tolist() == [97, 98]
    twice = huggingface_tokenizer.save(again, t5.path, run.config.model)
    assert Tokenizer.from_file(str(twice)).encode("ab").ids == [97, 98, 257]


def test_going_on_from_a_folder(flan, pairs, tmp_path):
    """By the preset: the shape and the tokenizer are the folder's, and a step of almost nothing leaves its weights."""
    import train

    fields = {"data.train": pairs, "data.validation": pairs, "data.context": 32, "training.batch_size": 8}
    fields |= {"training.steps": 1, "training.gradient_accumulation": 1, "optimizer.learning_rate": 1e-9}
    fields |= {"observe.sample_prompt": None, "model.compute_dtype": "float32"}
    flags = [str(part) for name, value in fields.items() for part in (f"--{name}", value)]
    train.train(["t5_small", "--workdir", str(tmp_path / "run"), "--init-from", str(flan.path), *flags])
    run, theirs = lm.load(tmp_path / "run"), lm.load(flan.path)
    assert run.config.model.start_id == 0 and run.config.model.dropout == 0.1
    assert arithmetic(run.config.model) == arithmetic(theirs.config.model)
    assert run.tokenizer.sha256 == theirs.tokenizer.sha256
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), run.params, theirs.params)
    assert checkpoint.read_config(tmp_path / "run" / "checkpoints" / "1").init_from == str(flan.path)


def test_scores_of_a_folder_are_what_its_logits_say(t5, pairs):
    """Every target and its EOS, each given its source and what stands before it."""
    run = lm.load(t5.path)
    scores = lm.evaluate(run, pairs)
    nats = tokens = 0.0
    for line in Path(pairs.removeprefix("pairs:")).read_text().splitlines():
        source, target = ([*run.tokenizer.encode(side).tolist(), 257] for side in line.split("\t"))
        logits = np.asarray(run(np.array([[0, *target[:-1]]]), source=np.array([source])))[0].astype(np.float64)
        picked = logits[np.arange(len(target)), target]
        nats += (np.log(np.exp(logits).sum(-1)) - picked).sum()
        tokens += len(target)
    assert scores.tokens == tokens
    assert scores.nats == pytest.approx(nats, rel=1e-5)
