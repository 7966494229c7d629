"""The demo's projector fitted anew by the real command, at a smaller setting than its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from captioner.demo import scenes
from captioner.fitting.state import FitState

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SMALL = ["--limit", "600", "--max-steps", "60", "--batch-size", "128", "--learning-rate", "0.01"]
NUM_SCORED = 300
SHIPPED = 0.9993
"""Held-out scenes that the shipped bundle captions wholly right."""


def test_a_projector_fitted_from_random_is_nearly_as_good_as_the_shipped_one(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-W", "ignore", ROOT / "jobs" / "fit_projector.py", *SMALL]
    done = subprocess.run(
        [*command, "--num-scored-images", str(NUM_SCORED)],
        cwd=tmp_path,
        env={**environment, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 60
    state = FitState.result((tmp_path / "demo-refit" / "_run" / "checkpoint.pt").read_bytes())
    examples = scenes.examples("validation", NUM_SCORED)
    right = [scenes.is_right(said, example.scene) for said, example in zip(state.best.captions, examples, strict=True)]
    assert sum(right) / NUM_SCORED >= 0.95 * SHIPPED
