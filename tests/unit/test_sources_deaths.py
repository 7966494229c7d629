"""Processes that ended in the middle of something, as the ones after them see it."""

import subprocess
import sys
from pathlib import Path

import pytest

from captioner.sources.deaths import begun

DIES = """
import os, signal, sys
from captioner.sources import deaths

deaths.machine = lambda: sys.argv[1] or REAL()
with deaths.begun("row 4096"):
    os.kill(os.getpid(), signal.SIGKILL)
""".replace("deaths.machine = ", "REAL = deaths.machine\ndeaths.machine = ")


@pytest.mark.parametrize(("machine", "num_deaths"), [("", 1), ("another container", 0)])
def test_deaths_are_those_of_processes_that_this_machine_can_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, num_deaths: int
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    subprocess.run([sys.executable, "-c", DIES, machine], check=False)
    marks = set(tmp_path.rglob("*.*"))
    assert len(marks) == 1
    for expected in (num_deaths, 0):
        with begun("row 4096") as found:
            assert found == expected
    assert set(tmp_path.rglob("*.*")) == (set() if num_deaths else marks)
