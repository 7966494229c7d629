"""Ends of a driver, for real: whatever was finished stays, and the same command ends with the unbroken table."""

import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.faults.conftest import NUM_IMAGES, NUM_PACKED
from tests.faults.running_job import (
    Job,
    assert_same,
    num_parts,
    table,
    verified,
    wait_for_nobody,
    wait_for_parts,
)
from tests.guard import GUARD_S
from tests.http_server import SlowStore

pytestmark = pytest.mark.slow

Finish = Callable[..., dict[str, Any]]

DRAINED = ("--drain-s", str(GUARD_S))  # on a busy machine nothing may be finished within 20 s


def finished_rows(output: Path) -> int:
    return sum(
        len(pd.read_parquet(output / folder)) for folder in ("captions", "failures") if (output / folder).exists()
    )


def test_a_driver_that_is_ended_again_and_again_leaves_whole_parts_and_a_rerun_does_the_rest(
    start: Callable[..., Job], images: Path, store: SlowStore, tmp_path: Path, unbroken: pd.DataFrame
) -> None:
    output, finished = tmp_path / "captions", 0
    for ending in (signal.SIGINT, signal.SIGKILL):  # SIGTERM is the spot notice below
        store.hold_after(600)  # more than the two blocks of 256 that one decoder fetches at once: one is whole
        job = start(images, output, "--drain-s", "2")  # what the store holds never comes
        wait_for_parts(job, output, 1 + num_parts(output))
        job.process.send_signal(ending)
        assert finished < finished_rows(output) < NUM_IMAGES, "the injector came too late to do anything"
        code, _, log = job.end()
        if ending == signal.SIGKILL:
            assert code == -signal.SIGKILL
            wait_for_nobody(job.mark)  # until its workers notice that it is gone, they may write all that was left
        else:
            assert (code, "the same command continues" in log) == (130, True), log
        finished = finished_rows(output)
    store.hold_after(math.inf)
    summary = start(images, output).summary()  # by Ray to the end; the other tests finish without it
    assert (summary["skipped_done"], summary["read"]) == (finished, NUM_IMAGES - finished)
    assert_same(table(output), unbroken)
    verified(str(output))


def test_a_spot_notice_during_tars_or_tables_commits_what_was_fetched_and_a_rerun_does_the_rest(
    start: Callable[..., Job], finish: Finish, packed: Path, tmp_path: Path, unbroken_packed: pd.DataFrame
) -> None:
    output = tmp_path / "captions"
    first = start(packed, output, "--rows-per-part", "32", *DRAINED)
    first.wait_for("decode child")  # which works on the first images, while most wait for a decoder
    first.process.terminate()
    code, _, log = first.end()
    assert (code, "the same command continues" in log) == (130, True), log
    finished = finished_rows(output)
    assert 0 < finished < NUM_PACKED, "the injector came too late to do anything"
    summary = finish(packed, output)
    assert (summary["skipped_done"], summary["read"]) == (finished, NUM_PACKED - finished)
    assert_same(table(output), unbroken_packed)
    verified(str(output))


def wait_for(job: Job, holds: Callable[[], object]) -> None:
    give_up = time.monotonic() + GUARD_S
    while not holds():
        assert job.process.poll() is None, f"the job ended before it could be interrupted: {job.end()}"
        assert time.monotonic() < give_up, "nothing came of it"
        time.sleep(0.02)


def test_a_spot_notice_before_the_first_part_is_full_still_leaves_what_was_captioned(
    start: Callable[..., Job], finish: Finish, images: Path, store: SlowStore, tmp_path: Path
) -> None:
    output, before = tmp_path / "captions", store.num_served
    store.hold_after(600)  # more than the two blocks of 256 that one decoder fetches at once: most are not begun
    job = start(images, output, "--rows-per-part", "100000", *DRAINED)
    wait_for(job, lambda: store.num_served >= before + 600)
    assert not list(output.glob("captions/*.parquet"))
    job.process.terminate()
    wait_for(job, lambda: list(output.glob("_run/stopping/[!.]*")))  # from then on no block is begun
    store.hold_after(math.inf)
    code, _, log = job.end()
    assert "finished so far; what is begun is finished and saved, for up to 600 s" in log
    assert (code, "the same command continues" in log) == (130, True), log
    assert 0 < finished_rows(output) < NUM_IMAGES, log
    assert finish(images, output)["skipped_done"] > 0
    assert len(table(output)) == NUM_IMAGES
    verified(str(output))
