"""Ends of a fit, for real: it goes on from its checkpoint and ends with the bits of one that was never cut."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from captioner.fitting.state import FitState
from tests.labelled_scenes import write_labels
from tests.unit import tiny_models

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
NUM_STEPS, NUM_KILLS = 400, 2


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("parts")
    labels = write_labels(tmp_path_factory.mktemp("labels"), {"train": 48, "validation": 12})
    models = [
        "--clip",
        str(tiny_models.save_clip(folder / "clip")),
        "--llama",
        str(tiny_models.save_llama(folder / "l")),
    ]
    training = ["--batch-size", "8", "--max-steps", str(NUM_STEPS), "--eval-every", "100", "--checkpoint-every", "20"]
    few = ["--num-scored-images", "4", "--max-caption-tokens", "8", "--workers", "1", "--max-failures", "9"]
    return [
        sys.executable,
        "-W",
        "ignore",
        str(ROOT / "jobs" / "fit_projector.py"),
        str(labels),
        *models,
        *training,
        *few,
    ]


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def start(command: list[str], output: Path, features: Path) -> subprocess.Popen[str]:
    whole = [*command[:5], str(output), *command[5:], "--features", str(features)]
    return subprocess.Popen(
        whole, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def descendants(pid: int) -> Iterator[int]:
    for child in Path(f"/proc/{pid}/task").glob("*/children"):
        for found in child.read_text().split():
            yield int(found)
            yield from descendants(int(found))


def fit_workers(pid: int) -> list[int]:
    """The processes of this job, and of no other, in which Ray Train runs its workers."""
    found = []
    for child in descendants(pid):
        try:
            name = Path(f"/proc/{child}/cmdline").read_bytes().decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if name.startswith("ray::RayTrainWorker"):
            found.append(child)
    return found


def step_of(output: Path) -> int:
    try:
        return FitState.result((output / "_run" / "checkpoint.pt").read_bytes()).step
    except FileNotFoundError:
        return 0


def wait_for_step(step: int, output: Path, job: subprocess.Popen[str]) -> None:
    give_up = time.monotonic() + 200
    while step_of(output) < step:
        assert job.poll() is None, f"the job ended before step {step}: {job.communicate()[1]}"
        if time.monotonic() > give_up:
            job.kill()
            raise AssertionError(f"step {step} never came: {job.communicate()[1]}")
        time.sleep(0.02)


def end(job: subprocess.Popen[str]) -> None:
    try:
        _, log = job.communicate(timeout=280)
    except subprocess.TimeoutExpired:
        job.kill()
        job.communicate()
        raise
    assert job.returncode == 0, log


def weights(output: Path) -> dict[str, torch.Tensor]:
    data = torch.load(output / "_run" / "checkpoint.pt", weights_only=True)
    return {**data["weights"], **{f"best.{name}": weight for name, weight in data["best"]["weights"].items()}}


@pytest.fixture(scope="module")
def unbroken(command, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("unbroken") / "bundle"
    end(start(command, output, output.parent / "features"))
    return output


def assert_same(output: Path, unbroken: Path) -> None:
    expected, found = weights(unbroken), weights(output)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    kept = ("step", "loss", "val_loss")
    rows = [
        [{name: row.get(name) for name in kept} for row in map(json.loads, path.read_text().splitlines())]
        for path in (folder / "_run" / "metrics.jsonl" for folder in (output, unbroken))
    ]
    assert rows[0] == rows[1]


def test_a_fit_whose_workers_are_killed_at_random_steps_ends_with_the_weights_of_an_unbroken_one(
    command, unbroken, tmp_path
):
    output = tmp_path / "bundle"
    job = start(command, output, unbroken.parent / "features")
    lots = random.Random(time.time_ns())
    killed_at = []
    for kill in range(NUM_KILLS):
        wait_for_step(20 + kill * 180 + lots.randrange(100), output, job)
        time.sleep(lots.random() * 0.2)
        workers = fit_workers(job.pid)
        assert workers, "no worker was found to kill"
        os.kill(workers[0], signal.SIGKILL)
        killed_at.append(step_of(output))
    end(job)
    assert all(step < NUM_STEPS for step in killed_at), f"the injector came too late: {killed_at}"
    assert_same(output, unbroken)


def test_a_fit_whose_driver_is_killed_is_continued_by_the_same_command(command, unbroken, tmp_path):
    output = tmp_path / "bundle"
    job = start(command, output, unbroken.parent / "features")
    wait_for_step(100, output, job)
    os.kill(job.pid, signal.SIGKILL)
    killed_at = step_of(output)
    job.communicate()
    time.sleep(5)  # its workers notice that it is gone
    assert killed_at < NUM_STEPS, "the injector came too late to do anything"
    assert not (output / "bundle.json").exists()
    end(start(command, output, unbroken.parent / "features"))
    assert_same(output, unbroken)
