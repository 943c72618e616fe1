import subprocess
import sys

import pytest

from lm.data import cache


def test_root_is_lm_cache_else_the_users_cache_folder(tmp_path, monkeypatch):
    assert cache.directory("a", "b") == tmp_path / "cache" / "a" / "b"
    assert cache.directory("a", "b").is_dir()
    monkeypatch.delenv("LM_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.directory() == tmp_path / "xdg" / "lm"


def test_a_failed_build_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), cache.building(tmp_path / "made") as scratch:
        (scratch / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.glob("made*")) == list(tmp_path.glob(".made*")) == []


def test_a_killed_build_is_never_seen(tmp_path):
    program = (
        "import os, signal, pathlib; from lm.data import cache\n"
        f"with cache.building(pathlib.Path({str(tmp_path / 'made')!r})) as scratch:\n"
        "    (scratch / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert not (tmp_path / "made").exists()
    with cache.building(tmp_path / "made") as scratch:
        (scratch / "whole").write_text("x")
    assert [file.name for file in (tmp_path / "made").iterdir()] == ["whole"]


def test_the_first_of_two_builds_wins(tmp_path):
    with cache.building(tmp_path / "made") as slow:
        (slow / "by").write_text("slow")
        with cache.building(tmp_path / "made") as quick:
            (quick / "by").write_text("quick")
    assert (tmp_path / "made" / "by").read_text() == "quick"
    assert [path.name for path in tmp_path.iterdir() if "made" in path.name] == ["made"]
