"""Kills of a job whose captioner cuts images into tiles, so that each has its own number of them and of tokens."""

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.faults.job_without_ray import captioned_without_ray
from tests.faults.running_job import Job, assert_same, flags, num_parts, table, verified, wait_for_parts
from tests.http_server import SlowStore, serving
from tests.unit.model.tiled_llavas import SIZES, photographs, save_llava_next

pytestmark = pytest.mark.slow

NUM_IMAGES = 45 * len(SIZES)
ROWS_PER_PART = 16


@pytest.fixture
def shapes() -> Iterator[SlowStore]:
    """Images of many shapes over HTTP, one in fifty cut short."""
    server = SlowStore()
    for number, image in enumerate(photographs(SIZES * 45)):
        file = io.BytesIO()
        image.save(file, "PNG")
        data = file.getvalue()
        server.files[f"/{number:05d}.png"] = data[:60] if number % 50 == 49 else data
    with serving(server):
        yield server
        server.hold_after(math.inf)


def test_a_job_in_tiles_that_is_killed_and_run_again_has_the_unbroken_table(shapes: SlowStore, tmp_path: Path) -> None:
    model = str(save_llava_next(tmp_path / "model"))
    listed = tmp_path / "images.txt"
    listed.write_text("".join(f"{shapes.url(f'{number:05d}.png')}\n" for number in range(NUM_IMAGES)))
    settings = [*flags(model), "--rows-per-part", str(ROWS_PER_PART), "--workers", "1"]

    def finish(output: Path) -> dict[str, Any]:
        return captioned_without_ray([str(listed), str(output), *settings])

    assert finish(tmp_path / "unbroken")["read"] == NUM_IMAGES
    unbroken, output = table(tmp_path / "unbroken"), tmp_path / "killed"
    shapes.hold_after(600)  # more than the two blocks of 256 that one decoder fetches at once: one is whole
    job = Job([str(listed), str(output), *settings])
    try:
        wait_for_parts(job, output)
        first = job.kill("captioner")
        shapes.hold_after(NUM_IMAGES - 600 - 1)
        while job.wait_for("captioner") == first:
            pass
        wait_for_parts(job, output, 1 + num_parts(output))
        assert job.kill_everything() > 1
    finally:
        job.kill_everything()
        shapes.hold_after(math.inf)
    assert 0 < len(pd.read_parquet(output / "captions")) < NUM_IMAGES, "the injector came too late to do anything"
    assert finish(output)["skipped_done"] > 0
    assert_same(table(output), unbroken)
    assert num_parts(output) > 1
    assert unbroken["caption"].nunique() > 5, "the images make a difference"
    verified(str(output))
