import pytest

from lm.config import InputError
from lm.data.sources.source import Source, Weighted, parse, parse_named


@pytest.mark.parametrize(
    ("written", "source"),
    [
        ("builtin:python-stdlib", Source("builtin:python-stdlib", "builtin", "python-stdlib")),
        ("tfds:a/b@1.0.0#x.y[test[:10%]]", Source("tfds:a/b@1.0.0#x.y", "tfds", "a/b@1.0.0", ("x.y",), "test[:10%]")),
        ("text:a[0-9]", Source("text:a[0-9]", "text", "a[0-9]")),
        ("text:a#b[train]", Source("text:a#b", "text", "a#b", (), "train")),
        ("text:gs://b/*.txt", Source("text:gs://b/*.txt", "text", "gs://b/*.txt")),
        ("jsonl:a.jsonl", Source("jsonl:a.jsonl", "jsonl", "a.jsonl")),
        ("jsonl:d#1/a.jsonl", Source("jsonl:d#1/a.jsonl", "jsonl", "d#1/a.jsonl")),
        ("jsonl:d#1/a#m.t[validation]", Source("jsonl:d#1/a#m.t", "jsonl", "d#1/a", ("m.t",), "validation")),
        ("parquet:s3://b/*#t", Source("parquet:s3://b/*#t", "parquet", "s3://b/*", ("t",))),
        ("tokens:a*.bin[train]", Source("tokens:a*.bin", "tokens", "a*.bin", (), "train")),
        ("pairs:a.tsv.gz[train]", Source("pairs:a.tsv.gz", "tsv", "a.tsv.gz", (), "train")),
        ("pairs:x.de,x.en", Source("pairs:x.de,x.en", "lines", "x.de,x.en")),
        ("pairs:tfds:w#de,en[test]", Source("pairs:tfds:w#de,en", "tfds", "w", ("de", "en"), "test")),
        ("pairs:jsonl:a*#t.de,t.en", Source("pairs:jsonl:a*#t.de,t.en", "jsonl", "a*", ("t.de", "t.en"))),
    ],
)  # fmt: skip
def test_sources(written, source):
    assert parse(written) == (Weighted(1.0, source),)


def test_a_mix_is_cut_only_before_a_weight_and_a_kind():
    first, second, third = parse(
        "mix:2*text:a+b*[0-9]+3*c.txt[train]+.5*pairs:x.de,y+1e-3*tfds:n#f[test[:9%]+test[9:]]"
    )
    assert (first.weight, first.source.place, first.source.split) == (2.0, "a+b*[0-9]+3*c.txt", "train")
    assert (second.weight, second.source.kind) == (0.5, "lines")
    assert (third.weight, third.source.split) == (0.001, "test[:9%]+test[9:]")


def test_names_of_validation_sets():
    assert parse_named("web-1.0=text:a=b.txt") == ("web-1.0", "text:a=b.txt")
    assert parse_named("text:a=text:b") == ("", "text:a=text:b")
    assert parse_named("a b=text:c") == ("", "a b=text:c")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("txet:a", "unknown source .*did you mean 'text'"),
        ("data/a.txt", r"for a file, text:data/a\.txt"),
        ("data/a.jsonl.zst", r"for a file, jsonl:data/a\.jsonl\.zst"),
        ("gs://b/a.parquet", "for a file, parquet:gs://b/a.parquet"),
        ("web=text:a", "only a source of data.validation has a name"),
        ("tfds:#text", "names no dataset"),
        ("pairs:a.txt", "no source of pairs: write"),
        ("pairs:a,b,c", "no source of pairs: write"),
        ("pairs:jsonl:a#de", "needs the two sides .*pairs:jsonl:a#en,de"),
        ("pairs:tfds:wmt", "needs the two sides"),
        ("mix:text:a", "'text:a' is not WEIGHT"),
        ("mix:0*text:a+1*text:b", "the weight 0 must be more than 0"),
        ("mix:1e999*text:a+1*text:b", "the weight 1e999 must be more than 0 and finite"),
        ("mix:1*text:a+1*txet:b", "unknown source of text 'txet:b'"),
        ("mix:1*text:a+1*mix:1*text:b+1*text:c", "a mix can't be part of a mix"),
        ("mix:1*text:a+1*text:b[train]", r"is \[train\] the split of all components, or of the last"),
    ],
)
def test_what_is_no_source_is_told_with_a_way_out(written, message):
    with pytest.raises(InputError, match=message):
        parse(written)
