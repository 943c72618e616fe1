"""The launcher: a place for each process, the first one's output, the others' errors, and one status."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from lm import launch
from lm.config import InputError

PLACES = """
import os, sys, time
place = [os.environ[name] for name in ("LM_PROCESS", "LM_PROCESSES", "JAX_NUM_CPU_DEVICES", "JAX_PLATFORMS")]
print(*place, *sys.argv[1:], flush=True)
print("oops", place[0], file=sys.stderr, flush=True)
"""


STOPPED_BY_A_SIGNAL = """
import os, signal, sys, time
def stop(number, frame):
    print("got", number, file=stream, flush=True)
    sys.exit(128 + number)
stream = sys.stdout if os.environ["LM_PROCESS"] == "0" else sys.stderr
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
print("ready", file=stream, flush=True)
for _ in range(600):  # a signal that comes just before a sleep is seen after it
    time.sleep(0.1)
"""


@pytest.fixture
def launched(tmp_path):
    """Runs a program through the command, in an empty folder but for it."""

    def run(program: str, *arguments: str, processes: int = 3) -> subprocess.CompletedProcess[str]:
        (tmp_path / "own.py").write_text(program)
        command = [sys.executable, "-m", "lm", "launch", "--processes", str(processes), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    return run


def test_the_first_is_heard_and_the_others_errors(launched):
    result = launched(PLACES, "--devices", "2", "--", "own.py", "--", "more")
    assert result.returncode == 0 and result.stdout == "0 3 2 cpu -- more\n"
    assert sorted(result.stderr.splitlines()) == ["oops 0", "process 1: oops 1", "process 2: oops 2"]


def test_the_first_status_that_is_not_0_comes_back_and_the_rest_is_ended(launched):
    began = time.monotonic()
    program = "import os, sys, time\nif os.environ['LM_PROCESS'] == '1': sys.exit(7)\ntime.sleep(60)"
    result = launched(program, "--timeout", "2", "--", "own.py")
    assert result.returncode == 7 and "killed     process 0, 2: others have failed" in result.stderr
    assert time.monotonic() - began < 20


def test_a_process_ended_by_a_signal_is_named(launched):
    result = launched("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "--", "own.py", processes=1)
    assert result.returncode == 137 and "process 0 was ended by SIGKILL" in result.stderr


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_passed_on_once_to_each(tmp_path, number, status):
    (tmp_path / "own.py").write_text(STOPPED_BY_A_SIGNAL)
    command = [sys.executable, "-m", "lm", "launch", "--processes", "2", "--", "own.py"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    try:
        assert process.stdout.readline() == "ready\n" and process.stderr.readline() == "process 1: ready\n"
        process.send_signal(number)
        out, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, out, error) == (status, f"got {number}\n", f"process 1: got {number}\n")


def test_scripts_of_the_checkout_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = launch._program(["train.py", "tiny"])
    assert found[0].endswith("/train.py") and found[1:] == ["tiny"]
    assert launch._program(["-m", "lm"]) == ["-m", "lm"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--", "nothing.py"), "there is no script nothing.py"),
        ((), "the command to launch follows --"),
        (("--",), "no command to launch"),
    ],
)
def test_what_can_not_be_launched_is_refused(launched, arguments, message):
    result = launched("", *arguments)
    assert result.returncode == 2 and message in result.stderr


def test_a_number_below_one_is_refused():
    with pytest.raises(InputError, match="--processes 0 --devices 1: use 1 or more of each"):
        launch.launch(["train.py"], processes=0)
