"""Run by test_processes.py: eval.py, and after it a line with the bytes that this process has read of arrays.

python -m tests.evaluation.two_processes ARGUMENTS OF EVAL.PY
"""

from __future__ import annotations

import sys

import tensorstore

import eval as command
from lm import cli


def bytes_read() -> int:
    """Bytes that TensorStore has read from files in this process."""
    found = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in found for value in metric["values"])


def evaluate(argv: list[str]) -> None:
    command.evaluate(argv)
    print(f"read {bytes_read()}", file=sys.stderr)


if __name__ == "__main__":
    cli.main(evaluate)
