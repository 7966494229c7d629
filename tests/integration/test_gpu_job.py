"""A whole job on a card: Ray's GPU actors, streams and graphs, with the model that is really trained."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from captioner.demo.scenes import write_folder
from tests.faults.running_job import Job

NUM_SCENES = 3000  # more than the slots and calls of one worker


def captions_of(scenes: Path, output: Path, *flags: str) -> pd.Series:
    summary = Job([str(scenes), str(output), "--dtype", "float32", *flags]).summary()
    assert (summary["captioned"], summary["failed"]) == (NUM_SCENES, 0)
    return pd.read_parquet(output / "captions").set_index("image_id")["caption"].sort_index()


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_a_job_on_a_gpu_writes_the_captions_of_one_on_cpus(tmp_path: Path) -> None:
    assert torch.cuda.is_available()
    write_folder(tmp_path / "scenes", "test", NUM_SCENES)
    on_cpus = captions_of(tmp_path / "scenes", tmp_path / "cpu", "--gpus-per-worker", "0")
    on_card = captions_of(tmp_path / "scenes", tmp_path / "gpu", "--gpus-per-worker", "1")
    assert on_card.index.equals(on_cpus.index)
    assert (on_card == on_cpus).mean() > 0.999  # two best words may lie closer than what a card's sums round to
