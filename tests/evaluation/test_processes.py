"""eval.py in two processes with two devices each finds what one process with one device finds, and says it once."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from lm import api, checkpoint
from lm.checkpoint import Loaded
from lm.config import DataConfig, ModelConfig, ParallelConfig, RunConfig
from lm.data.tokenizer import ByteTokenizer
from lm.nn import language_model, params
from lm.parallel import make_mesh, parameter_shardings
from tests.evaluation import two_processes
from tests.gloo import without_gloo

pytestmark = pytest.mark.slow

TEXTS = ["the cat sat on the mat, and the dog sat on the cat " * 3, "x", "žluťoučký kůň 👩‍🚀 pěl", "0123456789abcdef"]
WINDOW, STRIDE = 16, 5


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A checkpoint that eight devices have written, an eighth each."""
    model = ModelConfig(num_layers=1, d_model=32, num_heads=2, init_std=0.3)
    config = RunConfig(model=model, data=DataConfig(context=WINDOW)).resolve(258)
    specs = language_model.model_specs(config.model)
    places = parameter_shardings(make_mesh(ParallelConfig(fsdp=8)), specs)
    tree = jax.device_put(params.initialize(specs, jax.random.key(0)), places)
    run = Loaded(config, tree, ByteTokenizer(), 1, Path())
    return checkpoint.write(run, tmp_path_factory.mktemp("written") / "run", provenance={})


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return f"text:{folder}/*.txt"


def in_two_processes(*arguments, of_second=None):
    """(stdout, stderr without JAX's and Gloo's own lines, status) of both; `of_second` are the second's, if others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    strict = ("JAX_NUMPY_RANK_PROMOTION", "XLA_FLAGS")
    inherited = {name: value for name, value in os.environ.items() if name not in strict}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", two_processes.__name__, *map(str, given)]
            + ["--coordinator", address, "--processes", "2", "--process", str(index)],
            env=inherited | {"JAX_NUM_CPU_DEVICES": "2"}, cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index, given in enumerate([arguments, of_second or arguments])
    ]  # fmt: skip
    try:
        ended = [(*process.communicate(timeout=240), process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(*(re.sub(r"(?m)^WARNING:.*\n", "", without_gloo(said)) for said in each[:2]), each[2]) for each in ended]


def test_one_result_said_once_and_each_reads_its_part(written, source, tmp_path):
    files = {name: tmp_path / name for name in ("json", "by-document", "tokens")}
    flags = [part for name, path in files.items() for part in (f"--{name}", path)]
    how = ["--data", source, "--window", WINDOW, "--stride", STRIDE, "--parallel.fsdp", 4]
    (said, read, status), (silence, also_read, other_status) = in_two_processes(written, *how, *flags)
    assert status == other_status == 0, (read, also_read)
    assert silence == "" and "nats per token: " in said

    surprisals = io.StringIO()
    alone = api.evaluate(api.load(written), source, window=WINDOW, stride=STRIDE, tokens=surprisals)
    together = json.loads(files["json"].read_text(encoding="utf-8"))
    assert together["nats"] == pytest.approx(alone.nats, rel=1e-6)
    assert together["protocol"] == alone.to_dict()["protocol"]
    for count in ("tokens", "words", "bytes", "documents"):
        assert together[count] == getattr(alone, count)
    assert len(files["by-document"].read_text(encoding="utf-8").splitlines()) == len(TEXTS)
    ours = files["tokens"].read_text(encoding="utf-8").splitlines()
    for mine, its in zip(ours, surprisals.getvalue().splitlines(), strict=True):
        mine, its = json.loads(mine), json.loads(its)
        np.testing.assert_allclose(mine.pop("nats"), its.pop("nats"), atol=1e-5)
        assert mine == its

    size = sum(leaf.nbytes for leaf in jax.tree.leaves(checkpoint.restore_params(written)))
    for each in (read, also_read):  # half of what is split, all of the few numbers of norms, and what describes them
        assert 0 < int(re.fullmatch(r"read (\d+)\n", each)[1]) < 0.75 * size


MISTAKES = {
    "a file that can't be written": "--json .*in a folder that is there",
    "another window": "window: 16 on process 0, 15 on",
    "a damaged checkpoint": "is damaged: .*changed since it was written",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_on_one_ends_both_with_one_message(written, source, tmp_path, mistake):
    """The first alone looks at the file to write; the second has the window; each looks at a part of the checksums."""
    first = second = [written, "--data", source, "--window", WINDOW]
    if mistake == "a file that can't be written":
        first = [*first, "--json", tmp_path / "missing" / "file"]
    elif mistake == "another window":
        second = [*second[:-1], WINDOW - 1]
    else:
        copy = shutil.copytree(written, tmp_path / "copy")
        data = max(copy.glob("params/**/d/*"), key=lambda path: path.stat().st_size)
        data.write_bytes(data.read_bytes()[:-1] + b"?")
        first = second = [copy, *first[1:]]
    ended = in_two_processes(*first, of_second=second)
    assert [status for *_, status in ended] == [2, 2], ended
    said = "".join(error for _, error, _ in ended)
    assert len(re.findall("error: ", said)) == 1 and re.search(MISTAKES[mistake], said), said
