"""Ends of a driver, for real: whatever was finished stays, and the same command ends with the unbroken table."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from tests.bundles import save_tiny_bundle
from tests.pictures import encoded

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NUM_IMAGES = 1500


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("images")
    for seed in range(NUM_IMAGES):
        (folder / f"{seed:05d}.jpg").write_bytes(encoded(seed=seed))
    return folder, save_tiny_bundle(tmp_path_factory.mktemp("bundle"))


def command(inputs: tuple[Path, str], output: Path) -> list[str]:
    images, bundle = inputs
    flags = ["--model", bundle, "--max-new-tokens", "6", "--rows-per-part", "128"]
    return [sys.executable, str(ROOT / "jobs" / "caption.py"), str(images), str(output), *flags]


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "PYTHONPATH": str(ROOT)}


def wait_for_a_part(output: Path, process: subprocess.Popen[str]) -> None:
    give_up = time.monotonic() + 180
    while not list(output.glob("captions/*.parquet")):
        assert process.poll() is None, "the job ended before it could be interrupted"
        assert time.monotonic() < give_up, "no part was written"
        time.sleep(0.05)


def rows_on_disk(output: Path) -> int:
    return sum(int(part.stem.split("-")[-2]) for part in output.glob("captions/*.parquet"))


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_driver_that_is_ended_midway_leaves_whole_parts_and_a_rerun_does_the_rest(
    inputs: tuple[Path, str], tmp_path: Path, ending: signal.Signals
) -> None:
    output = tmp_path / "captions"
    first = subprocess.Popen(
        command(inputs, output), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for_a_part(output, first)
    first.send_signal(ending)
    assert rows_on_disk(output) < NUM_IMAGES, "the injector came too late to do anything"
    _, log = first.communicate(timeout=60)
    if ending == signal.SIGKILL:
        assert first.returncode == -signal.SIGKILL
        time.sleep(5)  # its workers notice that it is gone; until then they may write all that was left
    else:
        assert first.returncode == 1
        assert "the same command continues" in log
    finished = len(pd.read_parquet(output / "captions"))
    assert finished > 0

    second = subprocess.run(
        command(inputs, output), env=environment(), capture_output=True, text=True, timeout=240, check=True
    )
    summary = json.loads(second.stdout.splitlines()[-1])
    assert (summary["skipped_done"], summary["read"]) == (finished, NUM_IMAGES - finished)
    captions = pd.read_parquet(output / "captions")
    assert len(captions) == captions["key"].nunique() == NUM_IMAGES
