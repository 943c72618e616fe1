"""An evaluation's result for people: a table on a terminal, lines of text elsewhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lm.evaluation.measured import TITLES


def show(result: dict[str, Any]) -> None:
    """A table on a terminal, a line `name: value` each elsewhere."""
    names = ("nats_per_token", "standard_error", "perplexity", "word_perplexity", "bits_per_byte")
    rows = {name.replace("_", " "): _number(result[name]) for name in names}
    rows |= {name: f"{result[name]:,}" for name in ("tokens", "words", "bytes", "documents")}
    rows |= {f"protocol {name}": str(value) for name, value in result["protocol"].items()}
    if "task" in result:
        rows |= _task_rows(result["task"])
    rows |= {"model": f"{result['model']['path']} ({result['model']['parameters']:,} parameters)"}
    rows |= {"seconds": f"{result['seconds']:.2f}"}
    console = Console()
    if not console.is_terminal:
        print("\n".join(f"{name}: {value}" for name, value in rows.items()))
        return
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, Text(value))  # as it stands: [validation] is no markup
    console.print(table)


def _task_rows(task: dict[str, Any]) -> dict[str, str]:
    """The metrics with their confidence, how they were computed, and how the texts were written."""
    rows: dict[str, str] = {}
    for name, value in task["metrics"].items():
        interval = task["confidence"][name]
        rows[TITLES[name]] = f"{value:.2f}" + (f" (95 %: {interval[0]:.2f} to {interval[1]:.2f})" if interval else "")
    for name, value in task.get("lead_sentence", {}).items():
        rows[f"{TITLES[name]} of first sentences"] = f"{value:.2f}"
    rows |= {f"signature {TITLES[name]}": signature for name, signature in task["signatures"].items()}
    what = task["name"]
    counts = ("documents", "references", "unfinished", "cut_sources")
    rows |= {f"{what} {name.replace('_', ' ')}": f"{task[name]:,}" for name in counts}
    for name in ("num_beams", "length_penalty", "max_tokens"):
        rows[f"{what} {name.replace('_', ' ')}"] = str(task["protocol"][name])
    return rows | {f"{what} seconds": f"{task['seconds']:.2f}, {task['tokens_per_second']:.0f} tokens a second"}


def show_comparison(comparison: dict[str, Any]) -> None:
    """The models, a row each, and the differences of all pairs; tabs between the columns where it is no terminal."""
    names = ("nats_per_token", "perplexity", "word_perplexity", "bits_per_byte")
    models = comparison["models"]
    rows = [["", "model", *(name.replace("_", " ") for name in names), "window", "stride"]]
    for number, each in enumerate(models, 1):
        protocol = [str(each["protocol"].get(name, "-")) for name in ("window", "stride")]  # pairs have none
        rows.append([str(number), each["path"], *(_number(each[name]) for name in names), *protocol])
    _show_rows(rows)
    _show_rows(
        [["difference", "over the same documents", "standard error", "unit"]]
        + [
            [
                f"{pair['models'][1] + 1} - {pair['models'][0] + 1}",
                _number(pair["difference"], "+.6g"),
                _number(pair["standard_error"]),
                pair["unit"],
            ]
            for pair in comparison["pairs"]
        ]
    )


def _show_rows(rows: list[list[str]]) -> None:
    console = Console()
    if not console.is_terminal:
        print("\n" + "\n".join("\t".join(row) for row in rows))
        return
    table = Table()
    for name in rows[0]:
        table.add_column(name, overflow="fold")  # on a narrow terminal nothing is left out
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    console.print(table)


def _number(value: float | None, form: str = ".6g") -> str:
    return "-" if value is None else format(value, form)
