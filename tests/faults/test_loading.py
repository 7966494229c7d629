"""Crashes while a model loads, for real: one is tried again, a model that never loads is reported with its cause."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bundles import save_tiny_bundle
from tests.guard import GUARD_S
from tests.sample_images import encoded

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
INJECTOR = """
import importlib.util, os, signal, sys
from pathlib import Path

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "captioner.captioning.caption_worker":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def exec_module(module):
            marks = Path(os.environ["CRASH_MARKS"])

            def begin():
                tries = len(list(marks.iterdir()))
                (marks / str(tries)).touch()
                return tries

            class Doomed:
                def __init__(self, *args, **kwargs):
                    begin()
                    if os.environ["CRASH"] == "kill each":
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise RuntimeError("the weights melted")

            if os.environ["CRASH"] != "now and then":  # no load comes to its end: none needs torch
                module.CaptionWorker = Doomed
                return
            run(module)
            real = module.CaptionWorker.__init__
            def load(worker, *args, **kwargs):
                tries = begin()
                if tries == 2:
                    raise RuntimeError("a card that is not ready")
                if tries == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                real(worker, *args, **kwargs)
            caption = module.CaptionWorker.__call__
            def call(worker, rows):
                if len(list(marks.iterdir())) == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                return caption(worker, rows)
            module.CaptionWorker.__call__ = call
            module.CaptionWorker.__init__ = load
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("images")
    for seed in range(8):
        (folder / f"{seed}.jpg").write_bytes(encoded(seed=seed))
    return folder, save_tiny_bundle(tmp_path_factory.mktemp("bundle"))


def run_job(inputs: tuple[Path, str], tmp_path: Path, crash: str) -> "tuple[subprocess.CompletedProcess[str], int]":
    """Return the job, and how often its model was loaded."""
    images, bundle = inputs
    marks = tmp_path / "marks"
    marks.mkdir()
    (tmp_path / "sitecustomize.py").write_text(INJECTOR)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "caption.py"), str(images), str(tmp_path / "out"), "--model", bundle],
        env={**kept, "PYTHONPATH": f"{tmp_path}:{ROOT}", "CRASH": crash, "CRASH_MARKS": str(marks)},
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )
    return done, len(list(marks.iterdir()))


def test_a_model_that_never_loads_is_reported_with_its_cause(inputs: tuple[Path, str], tmp_path: Path) -> None:
    done, num_loads = run_job(inputs, tmp_path, "raise")
    assert done.returncode == 1
    assert "RuntimeError: the weights melted" in done.stderr.splitlines()[-1]
    assert num_loads == 4


def test_a_model_whose_load_is_killed_each_time_ends_the_job_with_a_cause(
    inputs: tuple[Path, str], tmp_path: Path
) -> None:
    done, num_loads = run_job(inputs, tmp_path, "kill each")
    assert done.returncode == 1
    assert "killed 3 times in a row while it loaded" in done.stderr.splitlines()[-1]
    assert num_loads == 6


def test_a_worker_that_dies_loading_and_a_load_that_fails_once_after_a_restart_are_tried_again(
    inputs: tuple[Path, str], tmp_path: Path
) -> None:
    done, num_loads = run_job(inputs, tmp_path, "now and then")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["captioned"] == 8
    assert num_loads == 4
