import gzip
import json

import pytest
import zstandard

from lm.config import InputError
from lm.data.corpus import open_corpus


def test_a_field_of_each_line_is_a_document(tmp_path):
    lines = [
        '{"text": "one", "meta": {"de": "eins"}, "a.b": "x"}',
        "",
        '{"text": "zw\\u00f6lf \\ud83d\\ude00", "meta": {"de": ""}}',
    ]
    data = "\r\n".join(lines).encode()
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(data))
    corpus = open_corpus(f"jsonl:{tmp_path}/*")
    assert [document[:2] for document in corpus] == [
        (f"{name}#{line}", text)
        for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst")
        for line, text in ((1, "one"), (3, "zwölf 😀"))
    ]
    nested = open_corpus(f"jsonl:{tmp_path}/a.jsonl#meta.de")
    assert [document.text for document in nested] == ["eins"]
    assert nested.skipped == 1
    assert nested.key != open_corpus(f"jsonl:{tmp_path}/a.jsonl#text").key


def test_a_field_may_have_a_dot_in_its_name(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a.b": "name", "a": {"b": "inside"}}')
    assert [document.text for document in open_corpus(f"jsonl:{tmp_path}/a.jsonl#a.b")] == ["name"]


def test_pairs_of_fields(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"t": {"en": "one", "de": "eins"}}))
    (document,) = open_corpus(f"pairs:jsonl:{tmp_path}/a.jsonl#t.en,t.de", pair_separator=" => ")
    assert document == ("a.jsonl#1", "eins", "one => ", ())


def test_a_list_of_strings_is_a_text_and_as_a_second_side_several_wordings_of_one(tmp_path):
    rows = [{"s": ["One.", "Two."], "t": [" ", "1 2", "one two"]}, {"s": "Three.", "t": "3"}, {"s": [], "t": [""]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = open_corpus(f"pairs:jsonl:{tmp_path}/a.jsonl#s,t", pair_separator="")
    assert list(corpus) == [("a.jsonl#1", "1 2", "One. Two.", ("one two",)), ("a.jsonl#2", "3", "Three.", ())]
    assert [document.references for document in corpus] == [("1 2", "one two"), ("3",)]
    assert corpus.skipped == 1
    assert [document.text for document in open_corpus(f"jsonl:{tmp_path}/a.jsonl#s")] == ["One. Two.", "Three."]


@pytest.mark.parametrize("row", [{"s": ["a"], "t": []}, {"s": " ", "t": "b"}])
def test_a_pair_with_an_empty_side_is_named(tmp_path, row):
    (tmp_path / "a.jsonl").write_text('{"s": "a", "t": "b"}\n' + json.dumps(row))
    side = r"first \(source\)" if row["s"] == " " else r"second \(target\)"
    with pytest.raises(InputError, match=f"a.jsonl, line 2: the {side} side of the pair is empty: give it a text"):
        list(open_corpus(f"pairs:jsonl:{tmp_path}/a.jsonl#s,t"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', "line 2 is not JSON: "),
        (b'[{"text": "x"}]', "line 2 is not a JSON object with fields but list"),
        (b"[", "line 2 is not JSON: .*one object a line, not one long list"),
        (b"[" * 100_000, "line 2 is not JSON: "),
        (
            b'{"txt": "x", "m": {"a": 1}}',
            "line 2 has no field 'text' .did you mean 'txt'.*: its fields are txt, m, m.a",
        ),
        (b'{"text": 7}', "line 2: the field 'text' is 7, not a string or a list of strings"),
        (b'{"text": ["x", 7]}', "line 2: the field 'text' is ..x., 7., not a string or a list"),
        (b'{"text": ["x", "\\ud800"]}', "line 2: the field 'text' holds '.ud800', half of a surrogate pair"),
        (b'{"text": null}', "line 2: the field 'text' is null, not a string"),
        (b'{"text": "ab\\ud800c"}', "line 2: the field 'text' holds '.ud800', half of a surrogate pair"),
        (b'{"text": "\xe9"}', "line 2 is not UTF-8: byte 0xe9 at offset 10"),
        (b'{"text": "x\0"}', "line 2 holds a NUL byte"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line)
    with pytest.raises(InputError, match=f"a.jsonl, {message}"):
        list(open_corpus(f"jsonl:{tmp_path}/a.jsonl"))


def test_utf16_is_recognised(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"text": "x"}'.encode("utf-16"))
    with pytest.raises(InputError, match="line 1 is UTF-16: convert it with iconv"):
        list(open_corpus(f"jsonl:{tmp_path}/a.jsonl"))


def test_a_long_number_in_another_field_is_no_matter(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"n": ' + "7" * 10_000 + ', "text": "x"}\n')
    assert [document.text for document in open_corpus(f"jsonl:{tmp_path}/a.jsonl")] == ["x"]
