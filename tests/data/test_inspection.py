"""What `python -m lm data inspect` says of a source."""

from __future__ import annotations

import pytest

from lm.config import DataConfig, TokenizerConfig
from lm.data import inspection


@pytest.fixture
def lines(tmp_path):
    (tmp_path / "a.txt").write_text("one two three")

    def of(context: int, rows: int) -> list[str]:
        data = DataConfig(train=f"text:{tmp_path}/a.txt", context=context)
        tokenizer = TokenizerConfig(kind="bytes")
        return list(inspection.inspect(data, tokenizer, rows_shown=rows, seed=0, progress=lambda *_: None))

    return of


def test_more_rows_than_there_are_are_those_that_there_are(lines):
    assert lines(4, 10**18) == lines(4, 4) != lines(4, 1)


def test_less_than_a_row_has_its_totals(lines):
    found = {name: value.strip() for name, _, value in (line.partition(":") for line in lines(64, 2))}
    assert found["tokens"].startswith("15") and found["documents"] == "1"
    assert found["rows"].startswith("none: ") and "64" in found["rows"]
