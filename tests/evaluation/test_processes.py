"""Two processes with two devices each find what one process with one device finds, and both find all of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.evaluation import two_processes

pytestmark = pytest.mark.slow


def test_every_process_has_the_whole_result(one_device):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", two_processes.__name__, address, "2"]
    processes = [
        subprocess.Popen(
            [*command, str(index)], env=os.environ | {"JAX_NUM_CPU_DEVICES": "2"}, cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        ended = [(*process.communicate(timeout=240), process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [status for *_, status in ended] == [0, 0], ended
    one, two = (json.loads(output.splitlines()[-1]) for output, *_ in ended)
    alone = two_processes.result(one_device)
    assert one == two and one["count"] == alone["count"]
    assert abs(one["nats"] - alone["nats"]) < 1e-6 and abs(one["error"] - alone["error"]) < 1e-6
    for mine, its in zip(one["tokens"], alone["tokens"], strict=True):
        np.testing.assert_allclose(mine, its, atol=1e-5)
