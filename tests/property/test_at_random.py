"""The property tests with more examples; outside CI other ones at each run."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_properties_hold_for_five_times_as_many_random_examples(capsys: pytest.CaptureFixture[str]) -> None:
    """Run one seed again: `pytest tests/property --hypothesis-profile long --hypothesis-seed SEED`."""
    seed = 1 if "CI" in os.environ else random.SystemRandom().randrange(2**32)
    options = ["--hypothesis-profile", "long", "--hypothesis-seed", str(seed)]
    with capsys.disabled():
        print(f"\npytest tests/property {' '.join(options)}")
    command = [sys.executable, "-m", "pytest", "-q", "--timeout", "3000", FOLDER, *options]
    done = subprocess.run(command, cwd=FOLDER.parents[1], env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(options)}\n{done.stdout}\n{done.stderr}"
