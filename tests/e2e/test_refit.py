"""The demo's projector fitted again by the real command, at a smaller setting than its own, beside the shipped one."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pytest

from captioner.captioning.captioner import Captioner
from captioner.demo import scenes
from tests.guard import GUARD_S

pytestmark = pytest.mark.slow

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
        timeout=GUARD_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def share_right(captions: Mapping[str, str]) -> float:
    """Return the share of the held-out scenes whose caption is wholly right."""
    held_out = list(scenes.examples("test", NUM_HELD_OUT))
    return sum(scenes.is_right(captions[example.image_id], example.scene) for example in held_out) / NUM_HELD_OUT


def captions_of_job(folder: Path, model: str, output: str = "captions") -> dict[str, str]:
    """Return what the caption job writes of each held-out scene."""
    run("caption.py", "held-out", output, "--model", model, cwd=folder)
    rows = pd.read_parquet(folder / output / "captions")
    return {Path(name).name: caption for name, caption in zip(rows["image_id"], rows["caption"], strict=True)}


def captions_of_shipped() -> dict[str, str]:
    """Return what the shipped bundle says of them, without a job."""
    held_out = list(scenes.examples("test", NUM_HELD_OUT))
    captioner = Captioner.from_bundle("demo")
    said = captioner.caption([example.image for example in held_out])
    captioner.close()
    return {example.image_id: str(getattr(one, "caption", one)) for example, one in zip(held_out, said, strict=True)}


def test_a_projector_fitted_from_random_is_nearly_as_good_as_the_shipped_one(tmp_path: Path) -> None:
    scenes.write_folder(tmp_path / "held-out", "test", NUM_HELD_OUT)
    assert run("fit_projector.py", *SMALL, cwd=tmp_path)["steps"] == 60
    shipped = share_right(captions_of_shipped())
    assert shipped > 0.9
    assert share_right(captions_of_job(tmp_path, "./demo-refit")) >= 0.95 * shipped
