"""Twenty kills and more, of everything that a job has, over one table: it ends as if there had been none."""

import math
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from tests.faults.running_job import Job, assert_only_parts, assert_same, kill, table, verified
from tests.guard import GUARD_S
from tests.http_server import SlowStore

pytestmark = pytest.mark.slow

NUM_KILLS = 20
IMAGES_A_KILL = 60  # which the store answers before each: so few that no life sees the end
KILLS_A_LIFE = 5  # then the driver or all of its Ray goes too
TARGETS = ("captioner", "decoder", "decode child", "reader", "writer")


def test_a_table_survives_twenty_random_kills(
    start: Callable[..., Job], store: SlowStore, images: Path, unbroken: pd.DataFrame, tmp_path: Path
) -> None:
    moments, killed, output = random.Random(2026), Counter[str](), tmp_path / "table"
    while killed.total() < NUM_KILLS:
        job = start(images, output)
        for _ in range(KILLS_A_LIFE):
            store.hold_after(IMAGES_A_KILL)
            killed[_kill_one(job, moments, killed)] += 1
        last = min(moments.sample(["driver", "everything"], 2), key=killed.__getitem__)
        job.kill_driver() if last == "driver" else job.kill_everything()
        killed[last] += 1
        assert_only_parts(output)
    store.hold_after(math.inf)
    assert len(killed) >= 5, f"the injector was not impartial: {killed}"
    assert {"driver", "everything"} <= set(killed)
    start(images, output).summary()
    assert_same(table(output), unbroken)
    verified(str(output))


def _kill_one(job: Job, moments: random.Random, killed: Counter[str]) -> str:
    """Kill a process after a random while and return its kind, of those there the least killed."""
    give_up = time.monotonic() + GUARD_S
    time.sleep(moments.uniform(0, 1.5))
    wanted = sorted(moments.sample(TARGETS, len(TARGETS)), key=killed.__getitem__)
    while time.monotonic() < give_up:
        assert job.process.poll() is None, f"the job ended before it could be killed: {job.end()}"
        if job.pids("decode child"):  # it has begun
            found = next((kind for kind in wanted if job.pids(kind)), None)
            if found and kill(job.pids(found)[0]):
                return found
        time.sleep(0.05)
    raise AssertionError(f"none of {wanted} to kill")
