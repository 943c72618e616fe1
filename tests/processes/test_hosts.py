"""Processes find each other, wait, agree and end together: a single one does none of that; three do it for real."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from lm.config import InputError
from lm.processes import coordination, hosts, rendezvous, watch

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}


@pytest.fixture
def environment(monkeypatch):
    """Sets what a cluster would set, and nothing else that speaks of one."""

    def set_only(**values):
        for name in [
            *sum(rendezvous.ENVIRONMENT.values(), ()),
            *(name for name in os.environ if name.startswith("SLURM_")),
        ]:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        coordination.cluster.cache_clear()

    set_only()
    yield set_only
    coordination.cluster.cache_clear()


@pytest.fixture
def started(monkeypatch):
    """The arguments that jax.distributed would have been started with."""
    calls = []
    monkeypatch.setattr(rendezvous.jax.distributed, "initialize", lambda *place, **how: calls.append((*place, how)))
    monkeypatch.setattr(rendezvous.jax.config, "update", lambda *_: None)
    monkeypatch.setattr(watch, "start", lambda: None)
    return calls


def test_a_single_process_starts_nothing_and_waits_for_nobody(environment, started):
    hosts.connect()
    hosts.connect(processes=1)
    environment(**SLURM, SLURM_NTASKS="1")  # srun -n1
    hosts.connect()
    environment(**SLURM, SLURM_NTASKS="4", SLURM_STEP_NUM_TASKS="1")  # srun -n1 in a job of 4 tasks
    hosts.connect()
    environment(KUBERNETES_SERVICE_HOST="10.0.0.1")  # some pod
    hosts.connect()
    assert not started and hosts.count() == 1 and hosts.is_first()
    began = time.monotonic()
    hosts.barrier("x")
    hosts.same("x", "y")
    hosts.tell("x", "y")
    with hosts.in_turn("x"):
        assert hosts.agree("x", "y") == "y" and hosts.told("x") is None
    hosts.finish()
    assert time.monotonic() - began < 1.0


def test_flags_come_before_the_environment_and_that_before_the_cluster(environment, started):
    environment(**SLURM, SLURM_NTASKS="2")
    hosts.connect()
    environment(**SLURM, SLURM_NTASKS="2", LM_COORDINATOR="a:1", LM_PROCESSES="3", JAX_PROCESS_ID="2")
    hosts.connect()
    hosts.connect("b:2", 4, 3)
    assert [(*place, how["cluster_detection_method"]) for *place, how in started] == [
        (None, 2, None, "slurm"),
        ("a:1", 3, 2, "deactivate"),
        ("b:2", 4, 3, "deactivate"),
    ]


@pytest.mark.parametrize(
    "given, message",
    [
        (("node:1", None, None), "--processes and --process are not given"),
        ((None, 2, 0), "--coordinator is not given"),
        ((None, None, 1), "--coordinator and --processes are not given"),
        (("node:1", 2, 2), "--process is 2 of --processes 2: use 0 to 1"),
        (("node:1", 0, 0), "--processes is 0"),
        ((None, 0, None), "--processes is 0"),
        ((None, -1, None), "--processes is -1"),
        (("node", 2, 0), "--coordinator is 'node': give HOST:PORT"),
        (("node:0", 2, 0), "--coordinator is 'node:0': give HOST:PORT"),
    ],
)
def test_what_lacks_or_contradicts_something_is_refused(environment, started, given, message):
    with pytest.raises(InputError, match=message):
        hosts.connect(*given)
    assert not started


def test_a_number_in_the_environment_that_is_none_is_refused(environment, started):
    environment(LM_PROCESSES="two")
    with pytest.raises(InputError, match="LM_PROCESSES is 'two': a number is needed"):
        hosts.connect()


PREAMBLE = """
import json, sys, time
from lm import cli
from lm.processes import hosts
from lm.config import InputError
def main(argv):
    hosts.connect()
    own = hosts.index()
    work(own)
"""


def three(work: str, *, before: str = "", count: int = 3) -> list[tuple[int, str, str]]:
    """(status, stdout, stderr) of three processes that each do this."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    program = (
        f"def work(own):\n{textwrap.indent(textwrap.dedent(work), '    ')}\n{PREAMBLE}\n{before}\ncli.main(main)\n"
    )
    place = {"LM_COORDINATOR": address, "LM_PROCESSES": "3", "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=os.environ | place | {"LM_PROCESS": str(index)}, text=True,
            cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for index in range(count)
    ]  # fmt: skip
    try:
        ended = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, ended, strict=True)]


@pytest.mark.slow
def test_they_agree_and_leave_word():
    ended = three("""
    hosts.same("colour", "blue")
    said = [hosts.agree("what", f"{own}{turn}") for turn in "ab"]
    if own == 2:
        hosts.tell("stop", "15")
    hosts.barrier("here")
    turns = []
    with hosts.in_turn("the text"):
        turns.append(time.monotonic())
        time.sleep(0.3 if own == 0 else 0)
    print(json.dumps([hosts.count(), said, hosts.told("stop"), hosts.told("go"), turns]))
    """)
    assert [status for status, *_ in ended] == [0, 0, 0], ended
    found = [json.loads(stdout) for _, stdout, _ in ended]
    assert all(each[:4] == [3, ["0a", "0b"], "15", None] for each in found)
    assert all(each[4][0] >= found[0][4][0] + 0.3 for each in found[1:]), "the others wait for the first"


@pytest.mark.slow
def test_who_has_another_value_is_named_with_its_fields():
    ended = three("""hosts.same("config", json.dumps({"a": {"b": 1, "c": 2}} | ({"d": 3} if own == 1 else {})))""")
    assert [status for status, *_ in ended] == [2, 2, 2], ended
    assert "error: process 1 has another config than process 0:\n  d: None on process 0, 3 on process 1" in ended[0][2]
    assert not ended[1][2] and not ended[2][2], "one message, by the first process"


@pytest.mark.slow
def test_who_does_not_come_to_a_barrier_is_named():
    ended = three("""time.sleep(8) if own == 1 else hosts.barrier("the text", 1.0)""")
    assert [status for status, *_ in ended] == [watch.LOST_STATUS] * 3, ended
    assert "process 1 didn't come to 'the text' within 1 s" in ended[0][2]


@pytest.mark.slow
def test_an_error_of_our_own_ends_all_and_is_shown_where_it_is():
    ended = three("""
    if own == 1:
        raise KeyError("bug")
    time.sleep(60)
    """)
    assert [status for status, *_ in ended] == [1, 1, 1], ended
    assert "Traceback" in ended[1][2] and "error: process 1: KeyError: 'bug'" in ended[0][2]


@pytest.mark.slow
def test_processes_that_never_come_are_waited_for_a_stated_time():
    first, second = three(
        "pass", before="from lm.processes import rendezvous; rendezvous.CONNECT_SECONDS = 3.0", count=2
    )
    assert first[0] == second[0] == watch.LOST_STATUS, (first, second)
    assert "error: only some of the 3 processes have come at 127.0.0.1:" in first[2] and "within 3 s" in first[2]
    assert second[2].startswith("error: ") and "Traceback" not in first[2] + second[2]
