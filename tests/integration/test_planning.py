"""jobs/plan.py and then jobs/caption.py, as a user types them: the summary sets the prediction beside the run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from captioner.demo.scenes import write_folder

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def run(job: str, *arguments: str) -> dict[str, Any]:
    """The summary of a job of this repository."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / job), *arguments],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return summary


def test_a_job_that_was_planned_says_what_was_predicted_for_it(tmp_path: Path) -> None:
    images, output = tmp_path / "scenes", tmp_path / "captions"
    write_folder(images, "train", 300)
    job = (str(images), str(output), "--model", "demo")
    planned = run("plan.py", *job, "--sample", "64", "--gpu-hourly", "2.5", "--cpu-hourly", "0.04")
    assert (planned["images"], planned["sample"]) == (300, 64)
    assert planned["here"]["price_per_million"] > 0
    assert planned["here"]["hours"] > 0
    captioned = run("caption.py", *job)
    assert (captioned["read"], captioned["captioned"]) == (300, 300)
    assert captioned["predicted"]["seconds"] == pytest.approx(planned["here"]["hours"] * 3600, abs=0.5)
