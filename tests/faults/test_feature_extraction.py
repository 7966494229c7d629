"""The end of an extraction, for real: its finished parts stay, and the next run computes the rest and no more."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.bundles import save_tiny_bundle
from tests.faults.running_job import MARK, WRITERS_WAIT, wait_for_nobody
from tests.guard import GUARD_S
from tests.sample_images import encoded

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NUM_IMAGES = 1500
PARTS = "features/*/features/part-*.parquet"
_JOB = """
import json, sys
from captioner.cluster.session import joined_cluster
from captioner.config import ImageConfig, LabelsConfig, ModelConfig, ResourceConfig
from captioner.cluster.feature_pipeline import compute_features
from captioner.training.features.feature_plan import plan_features
from captioner.training.labels.labels import read_labels
from captioner.model.bundle import describe

labels_path, run_folder, bundle = sys.argv[1:]
model = describe(bundle)
labels = read_labels(LabelsConfig(labels_path=labels_path), run_folder)
plan = plan_features(labels, model, ModelConfig(), ImageConfig(), run_folder=run_folder)
with joined_cluster() as cluster:
    features = compute_features(plan, model, ResourceConfig(), cluster)
print(json.dumps([features.num_computed, features.num_reused]))
"""


def parts(run_folder: Path) -> list[Path]:
    return list(run_folder.glob(PARTS))


def rows_of(found: list[Path]) -> int:
    return sum(int(part.stem.rpartition("-")[2]) for part in found)


def test_an_extraction_that_is_killed_goes_on_from_its_parts(tmp_path: Path) -> None:
    rows = [{"image": f"{seed}.jpg", "caption": "x"} for seed in range(NUM_IMAGES)]
    for seed, row in enumerate(rows):
        (tmp_path / str(row["image"])).write_bytes(encoded(seed=seed))
    (tmp_path / "captions.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    bundle = save_tiny_bundle(tmp_path / "bundle")
    run_folder = tmp_path / "run"
    command = [sys.executable, "-c", _JOB, str(tmp_path / "captions.jsonl"), str(run_folder), bundle]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(ROOT), "CAPTIONER_CACHE": str(tmp_path / "local")}

    mark = uuid.uuid4().hex
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(WRITERS_WAIT)
    one_is_there = {"WRITERS_WAIT_WHILE": str(run_folder / PARTS), "PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}"}
    first = subprocess.Popen(
        command,
        env={**environment, **one_is_there, MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    give_up = time.monotonic() + GUARD_S
    while not parts(run_folder):
        assert first.poll() is None, "the job ended before it could be killed"
        assert time.monotonic() < give_up, "no part was written"
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    assert rows_of(parts(run_folder)) < NUM_IMAGES, "the kill came too late to do anything"
    first.communicate()
    wait_for_nobody(mark)  # until its workers notice that it is gone, they may write on
    finished = rows_of(parts(run_folder))

    second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=GUARD_S, check=True)
    assert json.loads(second.stdout.splitlines()[-1]) == [NUM_IMAGES - finished, finished]
    assert rows_of(parts(run_folder)) == NUM_IMAGES
