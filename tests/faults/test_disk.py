"""A disk that is full: the job says so, nothing torn is left, and with room again the same command does the rest."""

import contextlib
import math
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.faults.running_job import Job, assert_only_parts, assert_same, table, verified, wait_for_parts
from tests.http_server import SlowStore

pytestmark = pytest.mark.slow


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"only root may mount a disk: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Leave no room for another byte, and return what takes it."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        while shutil.disk_usage(disk).free:  # a write of the job that fails gives back what it took
            with contextlib.suppress(OSError):
                file.write(bytes(4096))
    assert filler.stat().st_size, "the injector did nothing"
    return filler


def test_a_full_disk_ends_the_job_and_a_rerun_with_room_finishes_the_table(
    start: Callable[..., Job],
    finish: Callable[..., dict[str, Any]],
    store: SlowStore,
    images: Path,
    unbroken: pd.DataFrame,
    disk: Path,
) -> None:
    store.hold_after(600)  # more than the two blocks of 256 that one decoder fetches at once: one is whole
    first = start(images, disk / "table")
    wait_for_parts(first, disk / "table")
    filler = fill(disk)
    store.hold_after(math.inf)
    code, _, log = first.end()
    assert code == 1, log
    assert "No space left on device" in log.partition("error: ")[2], log
    assert_only_parts(disk / "table")
    done = len(table(disk / "table"))
    assert 0 < done < len(unbroken), "the disk was full too late"

    filler.unlink()
    assert finish(images, disk / "table")["skipped_done"] == done
    assert_same(table(disk / "table"), unbroken)
    verified(str(disk / "table"))
