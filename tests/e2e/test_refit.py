"""The demo's projector fitted anew by the real command, at a smaller setting than its own, beside the shipped one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from captioner.demo import scenes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

JOBS = Path(__file__).parents[2] / "jobs"
SMALL = ["--limit", "600", "--max-steps", "60", "--batch-size", "128", "--learning-rate", "0.01"]
NUM_HELD_OUT = 300


def run(script: str, *arguments: str, cwd: Path) -> dict[str, object]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", JOBS / script, *arguments],
        cwd=cwd,
        env={**environment, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(JOBS.parent)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def share_right(folder: Path, model: str) -> float:
    """Return the share of the held-out scenes that a bundle captions wholly right, by the caption job."""
    output = folder / f"captions-{Path(model).name}"
    run("caption.py", "held-out", str(output), "--model", model, cwd=folder)
    rows = pd.read_parquet(output / "captions")
    said = {Path(name).name: caption for name, caption in zip(rows["image_id"], rows["caption"], strict=True)}
    held_out = list(scenes.examples("test", NUM_HELD_OUT))
    return sum(scenes.is_right(said[example.image_id], example.scene) for example in held_out) / NUM_HELD_OUT


def test_a_projector_fitted_from_random_is_nearly_as_good_as_the_shipped_one(tmp_path: Path) -> None:
    scenes.write_folder(tmp_path / "held-out", "test", NUM_HELD_OUT)
    assert run("fit_projector.py", *SMALL, cwd=tmp_path)["steps"] == 60
    assert share_right(tmp_path, "./demo-refit") >= 0.95 * share_right(tmp_path, "demo")
