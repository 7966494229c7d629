"""Twenty kills and more, of everything that a job has, over one table: it ends as if there had been none."""

import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.faults.running_job import Job, assert_only_parts, assert_same, kill, table, verified
from tests.guard import GUARD_S
from tests.http_server import SlowStore

pytestmark = pytest.mark.slow

NUM_KILLS = 20
KILLS_A_LIFE = 5  # then the driver or all of its Ray goes too
TARGETS = ("captioner", "decoder", "decode child", "reader", "writer")


def test_a_table_survives_twenty_random_kills(
    start: Callable[..., Job],
    finish: Callable[..., dict[str, Any]],
    store: SlowStore,
    images: Path,
    unbroken: pd.DataFrame,
    tmp_path: Path,
) -> None:
    moments, killed, outputs = random.Random(2026), Counter[str](), [tmp_path / "table-0"]
    store.latency_s = 0.1  # so that few lives see the end; one that does begins another table
    while killed.total() < NUM_KILLS:
        job = start(images, outputs[-1])
        for _ in range(KILLS_A_LIFE):
            killed.update(_kill_one(job, moments, killed))
        if job.process.poll() is None:
            last = min(moments.sample(["driver", "everything"], 2), key=killed.__getitem__)
            job.kill_driver() if last == "driver" else job.kill_everything()
            killed[last] += 1
        assert_only_parts(outputs[-1])
        if job.process.returncode == 0:
            outputs.append(tmp_path / f"table-{len(outputs)}")
    assert len(killed) >= 5, f"the injector was not impartial: {killed}"
    assert {"driver", "everything"} & set(killed)
    for output in outputs:
        finish(images, output)
        assert_same(table(output), unbroken)
        verified(str(output))


def _kill_one(job: Job, moments: random.Random, killed: Counter[str]) -> list[str]:
    """Kill a process after a random while and return its kind, of those there the least killed; none if all is over."""
    give_up = time.monotonic() + GUARD_S
    time.sleep(moments.uniform(0, 1.5))
    wanted = sorted(moments.sample(TARGETS, len(TARGETS)), key=killed.__getitem__)
    while job.process.poll() is None:
        assert time.monotonic() < give_up, f"none of {wanted} to kill"
        if job.pids("decode child"):  # it has begun
            found = next(((kind, pids[0]) for kind in wanted if (pids := job.pids(kind))), None)
            if found and kill(found[1]):
                return [found[0]]
        time.sleep(0.05)
    return []
