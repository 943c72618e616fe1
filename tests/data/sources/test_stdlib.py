import subprocess
import sys
from pathlib import Path

import pytest

from lm.config import InputError
from lm.data import cache
from lm.data.sources import stdlib


@pytest.fixture
def library(tmp_path):
    """A small library of 40 modules, with what must be left out."""
    root = tmp_path / "library"
    for folder in ("", "pkg", "test", "pkg/tests", "site-packages/other", "ensurepip/_bundled"):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "module.py").write_text(f"# {folder}\n")
    for n in range(38):
        (root / f"m{n:02}.py").write_text(f"n = {n}\n")
    (root / "empty.py").touch()
    (root / "latin.py").write_bytes("# -*- coding: latin-1 -*-\n# é\n".encode("latin-1"))
    (root / "undecodable.py").write_bytes(b"# \xff\n")
    return root


def test_source_files_leaves_out_tests_packages_and_what_is_not_text(library):
    files = stdlib.source_files(library)
    assert set(files) == {"module.py", "pkg/module.py", "latin.py", *(f"m{n:02}.py" for n in range(38))}
    assert files["latin.py"].endswith("# é\n")
    assert list(files) == sorted(files)


def test_the_build_has_every_file_once_in_order(library):
    builder = stdlib.prepared(library)
    found = {}
    for split in ("train", "validation"):
        part = {document.id: document.text for document, _ in stdlib.documents(builder, split).scan()}
        assert list(part) == sorted(part)
        found |= part
    assert dict(sorted(found.items())) == stdlib.source_files(library)


def test_another_content_is_another_dataset(library):
    before = stdlib.prepared(library)
    assert stdlib.prepared(library).data_dir == before.data_dir
    (library / "m00.py").write_text("n = -1\n")
    after = stdlib.prepared(library)
    assert after.data_dir != before.data_dir
    texts = [document.text for document, _ in stdlib.documents(after, "train+validation").scan()]
    assert len(texts) == 41
    assert "n = -1\n" in texts


def test_a_folder_without_python_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds 0 Python source files"):
        stdlib.prepared(tmp_path)


BUILD = """
import os, sys, pathlib
from lm.data.sources import stdlib
kill = {kill!r}
if kill:
    plain = stdlib.PythonStdlib._generate_examples
    def stop_in_the_middle(self, paths):
        for n, example in enumerate(plain(self, paths)):
            if n == 5:
                os.kill(os.getpid(), 9)
            yield example
    stdlib.PythonStdlib._generate_examples = stop_in_the_middle
builder = stdlib.prepared(pathlib.Path({library!r}))
assert builder.info.splits["train"].num_examples + builder.info.splits["validation"].num_examples == 41
"""


def start(library, *, kill=False):
    program = BUILD.format(kill=kill, library=str(library))
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_killed_build_leaves_nothing_to_be_taken_for_a_dataset(library):
    process = start(library, kill=True)
    process.communicate()
    assert process.returncode == -9
    assert not list(cache.directory("tfds").glob("python_stdlib/*/1.0.0"))
    assert stdlib.prepared(library).info.splits["train"].num_examples > 0


def test_two_processes_build_at_once_and_say_nothing(library):
    processes = [start(library) for _ in range(2)]
    for process in processes:
        assert process.communicate() == (b"", b"")
        assert process.returncode == 0
    assert len(list(cache.directory("tfds").glob("python_stdlib/*/1.0.0"))) == 1


def test_whoever_finishes_second_takes_what_is_there(library, monkeypatch):
    """The race itself, where no lock is seen: another machine renames its build into place in the midst of this one."""
    monkeypatch.setattr(cache, "_lock", lambda handle: False)
    plain = stdlib.PythonStdlib._split_generators

    def overtaken(self, dl_manager):
        monkeypatch.setattr(stdlib.PythonStdlib, "_split_generators", plain)
        stdlib.prepared(library)
        return plain(self, dl_manager)

    monkeypatch.setattr(stdlib.PythonStdlib, "_split_generators", overtaken)
    assert stdlib.prepared(library).info.splits["train"].num_examples > 0


def test_the_builtin_corpus(builtin):
    train, validation = builtin
    total = sum(len(document.text.encode()) for part in builtin for document in part)
    assert 9e6 < total < 15e6
    trained, held = ({document.id for document in part} for part in builtin)
    assert 0.05 < len(held) / len(trained | held) < 0.15
    assert trained.isdisjoint(held)
    assert "argparse.py" in trained | held
    assert not any(part in stdlib.NOT_SOURCE for name in trained | held for part in Path(name).parts)
    assert train.source == "builtin:python-stdlib[train]"


def test_neither_tensorflow_nor_torch_nor_the_network(library, tmp_path):
    """The data room builds, reads, tokenises and cuts batches without importing either, with sockets made to fail."""
    program = f"""
import sys, socket, pathlib
def refuse(*args, **kwargs): raise AssertionError("the network was used")
socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
from lm.config import TokenizerConfig
from lm.data import corpus, pipeline, rows, tokenizer, tokens
from lm.data.sources import stdlib
text = corpus.Corpus("library", stdlib.documents(stdlib.prepared(pathlib.Path({str(library)!r})), "train"))
store = tokens.tokenize(text, tokenizer.build(TokenizerConfig("bpe", None, 270), text))
cut = rows.make_rows(store, context=8, packing="split", prompt_loss=False)
next(iter(pipeline.Pipeline([(1.0, cut)], batch_size=2, seed=0).iterate()))
assert not {{"tensorflow", "torch"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
