"""Writers: a resumed run's files equal those of a run that never stopped; the console suits where it is shown."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import struct
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from lm.config import InputError
from lm.observe.writers import ConsoleWriter, JsonlWriter, TensorBoardWriter, WandbWriter, read_metrics

ROOT = Path(__file__).parents[2]


def training(step, loss=2.0, **more):
    return {"step": step, "tokens": 64 * step, "seconds": 0.5 * step, "train/loss": loss, **more}


def evaluation(step, nats=1.5, name=""):
    return {"step": step, f"eval/{name}nats_per_token": nats, f"eval/{name}bits_per_byte": 2.0}


def write_steps(path, steps, resume_step=None):
    writer = JsonlWriter(path, resume_step)
    writer.start({"start": {"resumed_from": resume_step}})
    for step in steps:
        writer.write(training(step, 1 / step))
        if step % 4 == 0:
            writer.write(evaluation(step))
    writer.close()


def without_starts(path):
    return [line for line in path.read_text().splitlines() if "start" not in json.loads(line)]


def test_resuming_drops_what_comes_again_and_keeps_the_starts(tmp_path):
    write_steps(tmp_path / "whole", range(1, 11))
    write_steps(tmp_path / "cut", range(1, 8))
    with (tmp_path / "cut").open("a") as file:
        file.write('{"step": 8, "tok')  # torn by SIGKILL
    write_steps(tmp_path / "cut", range(5, 11), resume_step=4)
    assert without_starts(tmp_path / "cut") == without_starts(tmp_path / "whole")
    starts = [record["start"]["resumed_from"] for record in read_metrics(tmp_path / "cut") if "start" in record]
    assert starts == [None, 4]


def test_starting_over_keeps_only_the_starts(tmp_path):
    write_steps(tmp_path / "run", range(1, 5))
    write_steps(tmp_path / "run", range(1, 9))
    assert [record["step"] for record in read_metrics(tmp_path / "run") if "step" in record][:4] == [1, 2, 3, 4]
    assert len(read_metrics(tmp_path / "run")) == 2 + 8 + 2


def test_a_whole_last_line_without_its_newline_stays(tmp_path):
    (tmp_path / "run").write_text('{"step": 1}\n{"step": 2}')
    JsonlWriter(tmp_path / "run", 2).close()
    assert (tmp_path / "run").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_sigkill_loses_no_line_that_was_written(tmp_path):
    code = """
import os, signal, sys
from lm.observe.writers import JsonlWriter
writer = JsonlWriter(sys.argv[1])
for step in range(1, 101):
    writer.write({"step": step})
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], env=environment)
    assert process.returncode == -signal.SIGKILL
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == list(range(1, 101))


def test_lines_are_strict_json(tmp_path):
    """NaN would make every other JSON reader refuse the whole file."""
    writer = JsonlWriter(tmp_path / "new" / "run")
    writer.write(
        {"step": np.int64(1), "a": math.nan, "b": np.float32("inf"), "c": np.float32(0.5), "d": {"e": [-math.inf]}}
    )
    line = (tmp_path / "new" / "run").read_text()  # at once, not when closed
    assert line == '{"step": 1, "a": null, "b": null, "c": 0.5, "d": {"e": [null]}}\n'
    writer.close()


def test_reading_leaves_out_a_line_being_written(tmp_path):
    (tmp_path / "run").write_text('{"step": 1}\n{"st')
    assert read_metrics(tmp_path / "run") == [{"step": 1}]
    with pytest.raises(InputError, match="nowhere can't be read"):
        read_metrics(tmp_path / "nowhere")


def console(terminal, width=80):
    environment = {"TERM": "xterm"} if terminal else {}
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None, _environ=environment)


def shown(output, total_steps, records, seconds=None):
    writer = ConsoleWriter(total_steps, seconds, console=output)
    writer.message("resuming from step [4]")
    writer.start({"start": {}})
    for record in records:
        writer.write(record)
    writer.message("saved step 1000")
    writer.close()
    return output.file.getvalue()


def test_plain_lines_are_few_and_whole(tmp_path):
    records = [training(step, **{"train/tokens_per_second": 3e4 if step % 2 else 1e4}) for step in range(1, 1001)]
    lines = shown(console(False), 1000, [*records, evaluation(1000)]).splitlines()
    assert lines[0] == "resuming from step [4]" and lines[-1] == "saved step 1000"
    assert lines[1] == "step 1/1000  loss 2.0000  perplexity 7.389  30k tokens/s"
    # The speed of steps 2 to 50 by their own time, not the last step's and not by the clock, which saw more.
    assert lines[2] == "step 50/1000  loss 2.0000  perplexity 7.389  14.8k tokens/s  7:55 left"
    assert lines[-3].startswith("step 1000/1000") and lines[-3].endswith("0:00 left")
    assert lines[-2] == "step 1000  validation loss 1.5000  perplexity 4.482  bits per byte 2.0000"
    assert len(lines) == 1 + 21 + 2
    assert not any("\x1b" in line or "\r" in line for line in lines)


def test_plain_lines_of_a_run_that_ends_by_time():
    lines = shown(console(False), None, [training(step) for step in range(1, 201)], seconds=100.0).splitlines()
    assert lines[1] == "step 1  loss 2.0000  perplexity 7.389  1:40 left"
    assert lines[-2] == "step 200  loss 2.0000  perplexity 7.389  0:00 left"
    assert len(lines) == 2 + 21


def test_a_diverged_or_unevaluated_run_is_shown_too():
    text = shown(console(False), 9, [training(1, None), evaluation(1, None), training(9, 900.0)])
    assert "loss nan  perplexity nan" in text and "loss 900.0000  perplexity inf" in text


def test_several_validation_sets_are_named():
    text = shown(console(False), 9, [{**evaluation(3, 1.0, "wiki/"), **evaluation(3, 2.0, "code/")}])
    assert "step 3  validation wiki loss 1.0000" in text and "step 3  validation code loss 2.0000" in text


def test_what_a_model_wrote_has_a_line_of_its_own():
    text = shown(console(False), 9, [{**evaluation(3), "eval/bleu": 31.234, "eval/chrf": 55.5}])
    assert "step 3  validation loss 1.5000" in text and "step 3  validation BLEU 31.23  chrF 55.50\n" in text
    text = shown(console(True), 9, [{"step": 4, "eval/rouge1": 30.0, "eval/rougeL": 20.0, "eval/rougeLsum": 20.0}])
    assert "step 4  validation ROUGE-1 30.00  ROUGE-L 20.00\n" in text


def test_a_terminal_gets_a_bar_with_lines_above_it():
    records = [
        *(training(step, **{"train/tokens_per_second": 1e6}) for step in range(1, 11)),
        evaluation(5),
        training(10),
    ]
    text = shown(console(True), 10, records)
    last = text.rsplit("\r", 1)[-1]
    assert "10/10  loss 2.0000  ppl 7.389  0:00 left" in last and "val ppl 4.482" in last and "━" in last
    for line in ("step 5  validation loss 1.5000  perplexity 4.482  bits per byte 2.0000", "saved step 1000"):
        assert f"\x1b[2K{line}\n" in text  # the bar is erased first, so the two never share a line
    assert "step 1/10" not in text  # no plain lines beside the bar


def test_a_narrow_terminal_keeps_the_bar_on_one_line():
    text = shown(console(True, width=40), 10, [evaluation(5), training(10, **{"train/tokens_per_second": 1e6})])
    assert "\x1b[1A" not in text  # never moves up: nothing was wrapped


def events(path):
    """The events of a TensorBoard file: records of (length, checksum, bytes, checksum)."""
    from tensorboardX.proto.event_pb2 import Event

    content, found = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        found.append(Event.FromString(content[12 : 12 + length]))
        content = content[12 + length + 4 :]
    return found


def test_tensorboard_hides_what_a_resumed_run_writes_again(tmp_path):
    """TensorBoard drops the steps from the mark on; without the mark it shows both curves."""
    pytest.importorskip("tensorboardX")
    for resume_step, steps in ((None, range(1, 7)), (4, range(5, 9))):
        writer = TensorBoardWriter(tmp_path, resume_step)
        writer.start({"start": {"resumed_from": resume_step}})
        for step in steps:
            writer.write(training(step, **{"train/mfu": None}))
        writer.close()
    first, second = (events(path) for path in sorted(tmp_path.iterdir(), key=lambda path: path.suffix))
    assert [event.step for event in second if event.HasField("session_log")] == [5]
    for found, steps in ((first, [1, 2, 3, 4, 5, 6]), (second, [5, 6, 7, 8])):
        losses = [event.step for event in found if any(value.tag == "train/loss" for value in event.summary.value)]
        assert losses == steps


def test_wandb_goes_on_as_the_same_run(tmp_path, monkeypatch):
    started, logged = [], []
    run = types.SimpleNamespace(
        config={}, log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("finished")
    )
    fake = types.ModuleType("wandb")
    fake.Error = RuntimeError
    fake.init = lambda **arguments: started.append(arguments) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        writer = WandbWriter("project", tmp_path / "run", {"seed": 0})
        writer.start({"start": {"devices": 1}})
        writer.write(training(3, **{"train/mfu": None}))
        writer.close()
    assert started[0]["id"] == started[1]["id"] and len(started[0]["id"]) == 16
    assert [(entry["resume"], entry["project"]) for entry in started] == [("allow", "project")] * 2
    assert logged[0] == (3, {"tokens": 192.0, "seconds": 1.5, "train/loss": 2.0}) and logged[1] == "finished"


@pytest.mark.parametrize("package", ["tensorboardX", "wandb"])
def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    extra = "tensorboard" if package == "tensorboardX" else "wandb"
    with pytest.raises(InputError, match=f"pip install {package}"):
        TensorBoardWriter(tmp_path) if extra == "tensorboard" else WandbWriter("p", tmp_path, {})
    assert not list(tmp_path.iterdir())
