import gzip
import json
import lzma
import pickle
import random
import tracemalloc

import numpy as np
import pytest
import zstandard

from lm.config import InputError
from lm.data.corpus import open_corpus, open_splits
from lm.data.sources import holdout, text
from lm.data.sources.token_files import TokenFiles
from tests.data.reading import halves, ids, texts


def write(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.txt").write_text(content, encoding="utf-8", newline="")


def test_text_is_one_document_a_file_in_the_order_of_the_ids(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path, b="two\r\nlines", a="one")
    write(tmp_path / "deep", c="three")
    corpus = open_corpus(f"text:{tmp_path}/**/*.txt")
    found = [("a.txt", "one", "", ()), ("b.txt", "two\r\nlines", "", ()), ("deep/c.txt", "three", "", ())]
    assert list(corpus) == found
    assert list(corpus.scan()) == list(zip(corpus, (3, 13, 18), strict=True))
    assert corpus.size == 18


def test_ids_and_key_do_not_depend_on_where_the_text_lies(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        write(tmp_path / place, a="one", b="two")
    here, there = (open_corpus(f"text:{tmp_path}/{place}/*.txt") for place in ("here", "there"))
    assert (ids(here), here.key) == (ids(there), there.key)
    write(tmp_path / "there", b="tWo")
    assert open_corpus(f"text:{tmp_path}/there/*.txt").key != here.key


def test_the_key_tells_apart_how_a_text_is_read(tmp_path):
    write(tmp_path, a="one two", b="three four")
    whole = f"text:{tmp_path}/*.txt"
    keys = [open_corpus(f"{whole}{split}").key for split in ("", "[train]", "[validation]")]
    keys += [open_corpus(whole, document_separator=" ").key]
    assert len(set(keys)) == 4


def test_compressed_files_are_read_by_suffix(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("grüß".encode()))
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(b"dich"))
    (tmp_path / "c.txt.zst").write_bytes(zstandard.compress(b"Gott"))
    assert texts(open_corpus(f"text:{tmp_path}/*")) == ["grüß", "dich", "Gott"]


def test_what_is_not_text_is_named_by_its_offset(tmp_path):
    for bad, message in ((b"\xff", "is not UTF-8: byte 0xff at offset 9"), (b"\0", "holds a NUL byte at offset 9")):
        (tmp_path / "a.txt").write_bytes(b"one|two|x" + bad + b"|three")
        with pytest.raises(InputError, match=f"a.txt {message}"):
            list(open_corpus(f"text:{tmp_path}/a.txt", document_separator="|"))


def test_document_separator_splits_files(tmp_path):
    write(tmp_path, a="one<|>two<|>", b="<|>three")
    corpus = open_corpus(f"text:{tmp_path}/*.txt", document_separator="<|>")
    assert list(corpus) == [("a.txt#0", "one", "", ()), ("a.txt#1", "two", "", ()), ("b.txt#0", "three", "", ())]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1000])
def test_a_separator_is_found_wherever_the_blocks_of_a_file_end(tmp_path, monkeypatch, block):
    monkeypatch.setattr(text.stream, "BLOCK", block)
    content = "ä<|><|>ö<|<|>>ü<|><|><|>end<|"
    write(tmp_path, a=content)
    pieces = texts(open_corpus(f"text:{tmp_path}/a.txt", document_separator="<|>"))
    assert pieces == [piece for piece in content.split("<|>") if piece]


def test_empty_documents_are_left_out_and_counted(tmp_path):
    write(tmp_path, a="one")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b""))
    corpus = open_corpus(f"text:{tmp_path}/*")
    assert (texts(corpus), corpus.skipped) == (["one"], 1)
    with pytest.raises(InputError, match="has no documents: all its 1 documents are empty"):
        list(open_corpus(f"text:{tmp_path}/b*"))


def test_too_long_a_document_is_refused_before_it_is_read_whole(tmp_path, monkeypatch):
    write(tmp_path, a="one two " * 10)
    monkeypatch.setattr(text, "MAX_DOCUMENT_BYTES", 50)
    with pytest.raises(InputError, match="a.txt has more than 50 bytes of text.* or set data.document_separator"):
        list(open_corpus(f"text:{tmp_path}/a.txt"))
    assert len(list(open_corpus(f"text:{tmp_path}/a.txt", document_separator=" "))) == 20
    with pytest.raises(InputError, match="without the separator from offset 0 on"):
        list(open_corpus(f"text:{tmp_path}/a.txt", document_separator="|"))


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Twice the text, the same peak: what it is differs by version of Python."""
    peaks = {"jsonl": [], "text": []}
    for documents in (2000, 4000):
        data = "".join(json.dumps({"text": random.randbytes(2000).hex()}) + "\n" for _ in range(documents)).encode()
        (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(data))
        (tmp_path / "a.txt.gz").write_bytes(gzip.compress(data, 1))
        for kind, source in (("jsonl", "a.jsonl.zst"), ("text", "a.txt.gz")):
            tracemalloc.start()
            train, validation = halves(f"{kind}:{tmp_path}/{source}", document_separator="\n")
            assert sum(1 for _ in train) + sum(1 for _ in validation) == documents
            peaks[kind].append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    for small, large in peaks.values():
        assert large < 1.2 * small, peaks


def test_one_document_is_cut_at_nine_tenths_of_its_characters(tmp_path):
    text = "".join(chr(0x4E00 + n) for n in range(97))
    write(tmp_path, book=text)
    train, validation = halves(f"text:{tmp_path}/book.txt")
    assert list(train) == [("book.txt[train]", text[: int(97 * 0.9)], "", ())]
    assert list(validation) == [("book.txt[validation]", text[int(97 * 0.9) :], "", ())]


def test_documents_are_held_out_by_the_hash_of_their_id(tmp_path):
    write(tmp_path, **{f"file{n:03}": f"text {n}" for n in range(300)})
    train, validation = halves(f"text:{tmp_path}/*.txt")
    held = ids(validation)
    assert sorted([*ids(train), *held]) == ids(open_corpus(f"text:{tmp_path}/*.txt"))
    assert 15 <= len(held) <= 45
    (tmp_path / "file000.txt").unlink()
    write(tmp_path, extra="one more")
    again = ids(halves(f"text:{tmp_path}/*.txt")[1])
    assert set(again) - {"extra.txt"} == set(held) - {"file000.txt"}


@pytest.mark.parametrize("count", [holdout.FEW - 1, holdout.FEW, holdout.FEW + 1, 2500])
def test_the_rule_is_the_same_for_few_documents_and_many(tmp_path, count):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' * count)
    train, validation = halves(f"jsonl:{tmp_path}/a.jsonl")
    everything = [f"a.jsonl#{n}" for n in range(1, count + 1)]
    held = holdout.held_out(everything)
    assert ids(validation) == [name for name in everything if name in held]
    assert ids(train) == [name for name in everything if name not in held]


@pytest.mark.parametrize("count", range(2, 12))
def test_held_out_is_never_empty_and_never_all(count):
    for start in range(50):
        held = holdout.held_out([f"{start}/{n}" for n in range(count)])
        assert 1 <= len(held) < count


def test_opening_looks_at_the_first_documents_only(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' * (holdout.FEW + 1) + "no JSON")
    train, _ = halves(f"jsonl:{tmp_path}/a.jsonl")
    with pytest.raises(InputError, match=f"line {holdout.FEW + 2} is not JSON"):
        list(train)


def test_the_source_of_a_split_opens_the_same_split(tmp_path):
    write(tmp_path, **{f"file{n}": f"text {n}" for n in range(30)})
    (tmp_path / "file0").write_text("a file that is matched by a pattern with ] at its end")
    for pattern in ("*.txt", "file1.txt", "file[0-9]"):
        for part in halves(f"text:{tmp_path}/{pattern}"):
            again = open_corpus(part.source)
            assert (list(again), again.source, again.key) == (list(part), part.source, part.key)


def test_explicit_validation_sources_leave_training_whole(tmp_path):
    write(tmp_path, a="one", b="two")
    splits = open_splits(f"text:{tmp_path}/*.txt", f"text:{tmp_path}/b.txt")
    assert (texts(splits.train[0].corpus), texts(splits.validation[""])) == (["one", "two"], ["two"])
    splits = open_splits(f"text:{tmp_path}/*.txt", (f"b=text:{tmp_path}/b.txt", f"a=text:{tmp_path}/a.txt"))
    assert {name: texts(part) for name, part in splits.validation.items()} == {"b": ["two"], "a": ["one"]}
    assert list(splits.validation) == ["b", "a"]
    with pytest.raises(InputError, match="text:.*/a.txt has no name: of several, write each as NAME=SOURCE"):
        open_splits(f"text:{tmp_path}/*.txt", (f"text:{tmp_path}/a.txt", f"b=text:{tmp_path}/b.txt"))
    with pytest.raises(InputError, match="names 'b' twice"):
        open_splits(f"text:{tmp_path}/*.txt", (f"b=text:{tmp_path}/a.txt", f"b=text:{tmp_path}/b.txt"))


def test_a_mix_holds_out_of_each_component_by_its_own_rule(tmp_path):
    write(tmp_path, book="0123456789")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(50)))
    mix = f"mix:3*text:{tmp_path}/book.txt+0.5*jsonl:{tmp_path}/a.jsonl"
    splits = open_splits(mix, None)
    assert [component.weight for component in splits.train] == [3.0, 0.5]
    assert [component.corpus.source for component in splits.train] == [
        f"text:{tmp_path}/book.txt[train]",
        f"jsonl:{tmp_path}/a.jsonl[train]",
    ]
    validation = splits.validation[""]
    alone = halves(f"jsonl:{tmp_path}/a.jsonl")[1]
    found = list(validation.scan())
    assert [document for document, _ in found] == [
        ("0:book.txt[validation]", "9", "", ()),
        *((f"1:{name}", *rest) for name, *rest in alone),
    ]
    assert found[-1][1] <= validation.size
    again = open_corpus(validation.source)
    assert (list(again), again.key) == (list(validation), validation.key)
    whole = open_corpus(mix)
    assert (len(list(whole)), ids(whole)[:2]) == (51, ["0:book.txt", "1:a.jsonl#1"])


def test_a_mix_of_one_is_that_one(tmp_path):
    write(tmp_path, a="one", b="two")
    assert ids(open_corpus(f"mix:2*text:{tmp_path}/*.txt")) == ["a.txt", "b.txt"]
    assert ids(open_splits(f"mix:2*text:{tmp_path}/*.txt", None).validation[""])[0] in ("a.txt", "b.txt")


def test_ready_ids_in_a_mix_are_validated_on_by_name(tmp_path):
    write(tmp_path, a="one", b="two")
    np.arange(10, dtype="<u2").tofile(tmp_path / "a.bin")
    mix = f"mix:1*tokens:{tmp_path}/a.bin[train]+2*text:{tmp_path}/*.txt[train]"
    with pytest.raises(InputError, match=r"name each in data.validation, as in a=tokens:.*\[validation\] b=text:"):
        open_splits(mix, None)
    splits = open_splits(mix, (f"a=tokens:{tmp_path}/a.bin[validation]", f"b=text:{tmp_path}/*.txt[validation]"))
    assert isinstance(splits.validation["a"], TokenFiles)
    assert [component.corpus.source[-7:] for component in splits.train] == ["[train]"] * 2


def test_a_corpus_can_be_sent_to_another_process(tmp_path):
    write(tmp_path, a="one", b="two")
    for part in halves(f"text:{tmp_path}/*.txt"):
        assert list(pickle.loads(pickle.dumps(part))) == list(part)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("text:{}/nothing*.txt", "matches no file"),
        ("text:{}", r"matches a folder: write text:'.*/\*\*/\*.txt'"),
        ("text:{}/empty.txt", "no text: .*empty.txt is empty"),
        ("text:{}/latin1.txt", "latin1.txt is not UTF-8: byte 0xe9 at offset 3"),
        ("text:{}/broken.txt.gz", "broken.txt.gz is damaged"),
        ("text:{}/short.txt.gz", "short.txt.gz is damaged"),
        ("text:{}/later.txt.zst", "later.txt.zst is damaged"),
        ("text:{}/binary.txt", "binary.txt holds a NUL byte at offset 4: .*binary file or UTF-16"),
        ("text:{}/utf16.txt", "utf16.txt is UTF-16: convert it with iconv -f utf-16"),
        ("text:", "names no file: write text:PATH"),
        ("pairs:jsonl:{}#a,b", r"matches a folder: write pairs:jsonl:'.*/\*\*/\*.jsonl'#a,b"),
        ("txet:{}/a.txt", "unknown source .*did you mean 'text'"),
        ("{}/a.txt", "for a file, text:.*a.txt"),
        ("builtin:python-stdlb", "did you mean 'python-stdlib'"),
        ("builtin:python-stdlib[tset]", "no split 'tset'.*: it has train, validation"),
    ],
)
def test_bad_sources_are_told_with_a_way_out(tmp_path, source, message):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "broken.txt.gz").write_bytes(b"not gzip at all")
    (tmp_path / "short.txt.gz").write_bytes(gzip.compress(b"x" * 1000)[:-12])
    (tmp_path / "later.txt.zst").write_bytes(b"x")
    (tmp_path / "binary.txt").write_bytes(b"text\0")
    (tmp_path / "utf16.txt").write_bytes("text".encode("utf-16"))
    with pytest.raises(InputError, match=message):
        list(open_corpus(source.format(tmp_path)))


def test_too_little_text_to_hold_out(tmp_path):
    write(tmp_path, a="x")
    with pytest.raises(InputError, match="one document of 1 characters"):
        open_splits(f"text:{tmp_path}/a.txt", None)
