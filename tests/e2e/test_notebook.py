"""The notebook of the guide: its cells as a person runs them, in their order."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.guard import GUARD_S
from tests.pages import ROOT

NOTEBOOK = ROOT / "jobs" / "guide" / "python.ipynb"
CELLS = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_stands_without_outputs() -> None:
    """They would be those of one machine, and grow old."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(not cell["outputs"] for cell in cells if cell["cell_type"] == "code")


def test_the_notebook_joins_no_ray_that_runs_on_the_machine() -> None:
    """That one may be of any size, and refuses to be told its own."""
    assert 'ray.init("local", ' in CELLS[-1]


def test_the_cells_without_ray_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec("\n".join(CELLS[:-1]), {})
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "the image shows a small red triangle below a large blue square on a black background"  # 3 beams
    assert out[-1].startswith("not_an_image - ")


@pytest.mark.slow
def test_the_whole_notebook_runs(tmp_path: Path) -> None:
    rows = dict(line.split(" | ") for line in executed(CELLS, tmp_path)[-4:])
    assert rows["no image"] == "empty"
    assert rows["scene-0004.jpg"] == "a black background with a large blue square above a small red triangle"


def executed(cells: list[str], folder: Path) -> list[str]:
    """What the cells print, in one Python as a kernel has it."""
    code = "\n".join(cells)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=GUARD_S)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
