"""Two drivers on one output, and a writer that outlives its own: one job writes at a time, and none comes late."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.faults.running_job import ROOT, Job, assert_only_parts, assert_same, table, verified, wait_for_parts
from tests.guard import GUARD_S
from tests.http_server import SlowStore

pytestmark = pytest.mark.slow

ONE_WRITER_SLEEPS = """
import os, signal, threading, time
from pathlib import Path

FOLDER, SYNC = Path(os.environ["FAULTS_FOLDER"]), os.fsync

def fsync(descriptor):
    SYNC(descriptor)
    half_written = os.readlink(f"/proc/self/fd/{descriptor}")
    if "/captions/.part-" not in half_written:
        return
    try:
        (FOLDER / "armed").rename(FOLDER / "taken")
    except FileNotFoundError:
        return
    (FOLDER / "taken").write_text(half_written)
    (FOLDER / "taken").rename(FOLDER / "sleeping")
    if os.fork():
        os.kill(os.getpid(), signal.SIGKILL)
    os.setsid()
    threading.Timer(900, os._exit, [0]).start()
    while not (FOLDER / "woken").exists():
        time.sleep(0.05)
    threading.Timer(600, os._exit, [0]).start()

os.fsync = fsync
"""
"""Once armed, lets the first writer outlive all of Ray: with a part that is whole and has no name yet, it sleeps."""


def test_a_second_driver_is_refused_and_a_writer_that_wakes_too_late_adds_nothing(
    start: Callable[..., Job],
    finish: Callable[..., dict[str, Any]],
    store: SlowStore,
    images: Path,
    unbroken: pd.DataFrame,
    tmp_path: Path,
) -> None:
    output, faults = tmp_path / "table", tmp_path / "faults"
    faults.mkdir()
    (faults / "sitecustomize.py").write_text(ONE_WRITER_SLEEPS)
    store.hold_after(600)  # so that the job does not end before its writer sleeps
    first = start(images, output, PYTHONPATH=f"{faults}:{ROOT}", FAULTS_FOLDER=str(faults))
    wait_for_parts(first, output)
    code, _, log = start(images, output).end()
    assert code == 2, f"two jobs were let write one table: {log}"
    assert "is in use" in log, log

    (faults / "armed").touch()
    store.hold_after(math.inf)
    while not (faults / "sleeping").exists():
        assert first.process.poll() is None, f"the job ended before its writer slept: {first.end()}"
        time.sleep(0.02)
    half_written = Path((faults / "sleeping").read_text())
    first.kill_driver()
    assert finish(images, output)["skipped_done"] > 0  # the crash left nothing that must be waited for
    assert half_written.exists(), "the writer did not sleep"
    (faults / "woken").touch()
    give_up = time.monotonic() + GUARD_S
    while half_written.exists():
        assert time.monotonic() < give_up, "the writer never woke"
        time.sleep(0.1)
    assert_only_parts(output)
    assert_same(table(output), unbroken)
    verified(str(output))
