import os
import subprocess
import sys
from pathlib import Path

import pytest

from captioner.inputs.crashes import count_crashes

DIES = """
import os, signal, sys
from captioner.inputs.crashes import count_crashes

with count_crashes("row 4096", sys.argv[1] or None):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("machine", "num_crashes"), [("", 1), ("another container", 0)])
def test_only_crashes_of_processes_that_this_machine_can_see_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, num_crashes: int
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    subprocess.run([sys.executable, "-c", DIES, machine], check=False)
    marks = set(tmp_path.rglob("*.*"))
    assert len(marks) == 1
    for expected in (num_crashes, 0):
        with count_crashes("row 4096") as found:
            assert found == expected
    assert set(tmp_path.rglob("*.*")) == (set() if num_crashes else marks)


@pytest.mark.parametrize("how", ["a link", "open to all", "a file"])
def test_a_folder_that_another_user_may_have_made_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("CAPTIONER_CACHE", str(tmp_path / "cache"))
    folder, other = tmp_path / f"captioner-reading-{os.getuid()}", tmp_path / "other"
    other.mkdir(mode=0o700)
    match how:
        case "a link":
            folder.symlink_to(other)
        case "open to all":
            folder.mkdir()
            folder.chmod(0o777)
        case _:
            folder.touch()
    with count_crashes("row 1"):
        assert [mark.parent.name for mark in tmp_path.rglob(f"*.{os.getpid()}")] == ["reading"]
    assert not list(other.iterdir())


def test_a_link_in_place_of_a_mark_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with count_crashes("row 1"):
        [mark] = tmp_path.rglob(f"*.{os.getpid()}")
    mark.symlink_to(tmp_path / "precious")
    with count_crashes("row 1"):
        assert not mark.is_symlink()
    assert not (tmp_path / "precious").exists()
