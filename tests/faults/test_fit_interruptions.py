"""Ends of a fit, for real: it goes on from its checkpoint and ends with the bits of one that was never cut."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from captioner.training.fit.fit_state import FitState
from tests.faults.fit_without_ray import fitted_without_ray
from tests.faults.running_job import MARK, wait_for_nobody
from tests.guard import GUARD_S
from tests.labelled_scenes import write_labels
from tests.unit.model import tiny_models

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NUM_STEPS = 400


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
    few = ["--num-scored-images", "4", "--max-caption-tokens", "8", "--max-failures", "9"]
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


CHECKPOINTS_WAIT = """
import os, time
from pathlib import Path

SYNC = os.fsync

def fsync(descriptor):
    SYNC(descriptor)
    path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    if not path.name.startswith(".checkpoint"):
        return
    from captioner.training.fit.fit_state import FitState
    while FitState.read(path.read_bytes()).step >= int(os.environ["HELD_FROM"]) and Path(os.environ["HELD"]).exists():
        time.sleep(0.02)

os.fsync = fsync
"""


def checkpoints_wait(site: Path, held_from: int) -> dict[str, str]:
    """Return variables with which checkpoints from a step on, and so their fit, wait until SITE/held is gone."""
    site.mkdir()
    (site / "sitecustomize.py").write_text(CHECKPOINTS_WAIT)
    (site / "held").touch()
    return {"HELD_FROM": str(held_from), "HELD": str(site / "held"), "PYTHONPATH": f"{site}:{ROOT}"}


class Fit:
    """A running fit, which says on `log` what happens to it. It waits at the step `held_from` until `go_on`."""

    def __init__(
        self,
        command: list[str],
        output: Path,
        features: Path,
        *,
        workers: int | str = 1,
        held_from: int | None = None,
        **variables: str,
    ) -> None:
        if held_from is not None:
            variables |= checkpoints_wait(output.with_suffix(".site"), held_from)
        whole = [*command[:5], str(output), *command[5:], "--features", str(features), "--workers", str(workers)]
        self.output, self.log, self.mark = output, output.with_suffix(".log"), uuid.uuid4().hex
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                whole,
                env={**environment(), MARK: self.mark, **variables},
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )

    @property
    def step(self) -> int:
        """The step of the checkpoint, 0 for none."""
        try:
            return FitState.read((self.output / "_run" / "checkpoint.pt").read_bytes()).step
        except FileNotFoundError:
            return 0

    def wait_for_step(self, step: int) -> None:
        self.wait_for(f"step {step}", lambda: self.step >= step)

    def wait_for(self, what: str, holds: Callable[[], bool]) -> None:
        give_up = time.monotonic() + GUARD_S
        while not holds():
            assert self.process.poll() is None, f"the job ended before {what}: {self.log.read_text()}"
            if time.monotonic() > give_up:
                self.process.kill()
                raise AssertionError(f"{what} never came: {self.log.read_text()}")
            time.sleep(0.02)

    def pid_of_worker(self, rank: int) -> int:
        """Return the process of the worker that has this rank now, once the log, which comes late, names it."""
        self.wait_for(f"a worker of rank {rank}", lambda: self._living_worker(rank))
        return self._living_worker(rank)

    def _living_worker(self, rank: int) -> int:
        """Return the last process with this rank, 0 if it is gone."""
        said = re.findall(rf"fit worker={rank} of=\d+ pid=(\d+)\b", self.log.read_text())
        try:
            is_there = said and Path(f"/proc/{said[-1]}/cmdline").read_bytes().startswith(b"ray::RayTrainWorker")
        except FileNotFoundError:
            return 0
        return int(said[-1]) if is_there else 0

    def go_on(self) -> None:
        """Let it take its steps to the end."""
        self.output.with_suffix(".site").joinpath("held").unlink()

    def kill_worker(self, rank: int) -> None:
        """Kill the process of the worker that has this rank now."""
        os.kill(self.pid_of_worker(rank), signal.SIGKILL)

    def end(self) -> None:
        try:
            self.process.wait(timeout=GUARD_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        assert self.process.returncode == 0, self.log.read_text()


def weights(output: Path) -> dict[str, torch.Tensor]:
    data = torch.load(output / "_run" / "checkpoint.pt", weights_only=True)
    return {**data["weights"], **{f"best.{name}": weight for name, weight in data["best"]["weights"].items()}}


@pytest.fixture(scope="module")
def unbroken_of_two(command, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("two") / "bundle"
    Fit(command, output, output.parent / "features", workers=2).end()
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


def test_a_fit_whose_worker_and_driver_are_killed_at_random_steps_ends_with_the_weights_of_one_without_ray(
    command, tmp_path
):
    lots = random.Random(2026)
    fit = Fit(command, tmp_path / "bundle", tmp_path / "features", held_from=320)
    fit.wait_for_step(20 + lots.randrange(100))
    time.sleep(lots.random() * 0.2)
    fit.kill_worker(0)
    killed_at = [fit.step]
    fit.wait_for_step(200 + lots.randrange(100))
    os.kill(fit.process.pid, signal.SIGKILL)
    killed_at.append(fit.step)
    fit.process.wait()
    wait_for_nobody(fit.mark)
    assert all(step < NUM_STEPS for step in killed_at), f"the injector came too late: {killed_at}"
    assert not (fit.output / "bundle.json").exists()
    Fit(command, fit.output, tmp_path / "features").end()
    flags = command[command.index("--clip") :]
    assert_same(fit.output, fitted_without_ray([command[4], str(fit.output), *flags], tmp_path / "features"))


def test_a_fit_of_two_workers_of_which_each_is_killed_ends_with_the_weights_of_an_unbroken_one(
    command, unbroken_of_two, tmp_path
):
    fit = Fit(command, tmp_path / "bundle", unbroken_of_two.parent / "features", workers=2, held_from=240)
    killed_at = []
    for rank, step in ((1, 60), (0, 220)):
        fit.wait_for_step(step)
        fit.kill_worker(rank)
        killed_at.append(fit.step)
    fit.go_on()
    fit.end()
    assert all(step < NUM_STEPS for step in killed_at), f"the injector came too late: {killed_at}"
    assert len(re.findall("fit worker=1 of=2", fit.log.read_text())) == 3, "both workers are started again"
    assert_same(fit.output, unbroken_of_two)
