"""How every command ends, and what it prints to."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import warnings

import pytest

from lm import cli


def test_a_full_disk_as_a_library_tells_it(monkeypatch, capsys):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back behind the command

    def command(argv):
        raise ValueError(f"RESOURCE_EXHAUSTED: failed to write: {os.strerror(errno.ENOSPC)}")

    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: no space is left on the disk: make room, and give the command again\n"


def test_a_terminal_without_letters_for_a_text():
    script = "from lm import cli; cli.main(lambda argv: print('Hé 你'))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, env=environment)
    assert done.stdout.split() == [b"H\\xe9", b"\\u4f60"]
