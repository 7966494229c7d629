"""kill -9 of each process of a job at seeded random moments: the table comes out as that of an unbroken run."""

import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.faults.running_job import (
    KINDS,
    ROOT,
    WRITERS_WAIT,
    Job,
    assert_only_parts,
    assert_same,
    kill,
    marked,
    num_parts,
    parent,
    table,
    verified,
    wait_for_parts,
)
from tests.http_server import SlowStore

pytestmark = pytest.mark.slow

Start = Callable[..., Job]
Finish = Callable[..., dict[str, Any]]


def test_a_job_survives_the_death_of_any_of_its_workers(
    start: Start, store: SlowStore, images: Path, unbroken: pd.DataFrame, tmp_path: Path
) -> None:
    moments, held = random.Random(5), tmp_path / "held"
    (tmp_path / "sitecustomize.py").write_text(WRITERS_WAIT)
    held.touch()  # a write may take less time than a look for its process
    store.hold_after(0)
    job = start(images, tmp_path / "table", PYTHONPATH=f"{tmp_path}:{ROOT}", WRITERS_WAIT_WHILE=str(held))
    for kind in ("reader", "decode child", "decoder", "captioner", "writer"):
        store.hold_after(100 if kind != "writer" else math.inf)  # so many that the job goes on, and does not end
        time.sleep(moments.uniform(0, 0.7))
        job.kill(kind)
    held.unlink()
    summary = job.summary()
    assert summary["read"] == len(unbroken)
    assert_same(table(tmp_path / "table"), unbroken)
    assert verified(str(tmp_path / "table"))["captioned"] == summary["captioned"]


def test_a_job_whose_own_ray_loses_its_raylet_or_gcs_ends_soon_with_the_reason_and_a_rerun_does_the_rest(
    start: Start, finish: Finish, images: Path, store: SlowStore, unbroken: pd.DataFrame, tmp_path: Path
) -> None:
    output = tmp_path / "table"
    for kind in ("raylet", "gcs"):
        store.hold_after(600)  # more than the two blocks of 256 that one decoder fetches at once: one is whole
        job = start(images, output)
        job.wait_for("captioner")  # by then no process of the job before is left
        wait_for_parts(job, output, 1 + num_parts(output))
        time.sleep(random.Random(kind).uniform(0, 0.5))
        job.kill(kind)
        code, _, log = job.end()
        assert code == 1, "the job ended before it was told"
        last = log.strip().splitlines()[-1]
        assert last.startswith(f"error: the {kind}"), log
        assert last.endswith("The same command continues")
        assert_only_parts(output)
    summary = finish(images, output)
    assert summary["skipped_done"] > 0
    assert summary["read"] > 0, "the injector came too late to do anything"
    assert_same(table(output), unbroken)
    verified(str(output))


def test_a_job_survives_the_death_of_the_node_that_decodes(
    start: Start, cluster: tuple[str, str], images: Path, store: SlowStore, unbroken: pd.DataFrame, tmp_path: Path
) -> None:
    address, mark = cluster
    store.hold_after(600)  # more than the two blocks of 256 that one decoder fetches at once: one is whole
    job = start(images, tmp_path / "table", "--workers", "2", RAY_ADDRESS=address, RAY_AUTH_MODE="disabled")
    wait_for_parts(job, tmp_path / "table")
    (decoder,) = (pid for pid, line in marked(mark) if KINDS["decoder"] in line)
    assert kill(parent(decoder)), "the node was gone before it was killed"
    store.hold_after(math.inf)
    assert job.summary()["read"] == len(unbroken)
    assert_same(table(tmp_path / "table"), unbroken)
    verified(str(tmp_path / "table"))
