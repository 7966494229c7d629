"""What a caption job says before it has a Ray; the job itself is in tests/integration."""

from pathlib import Path
from unittest.mock import Mock

import pyarrow as pa
import pytest

from captioner.captioning.plan import plan_job
from captioner.cluster.caption_pipeline import caption_images
from captioner.config import CaptionJobConfig, ModelConfig, VerifyConfig
from captioner.errors import OutputError
from captioner.schema import RejectReason, captioned_schema
from captioner.storage.faults import Fault, StoreError
from captioner.tables import CaptionTable, Stamp
from captioner.tables.verification import verify


def test_a_rerun_that_finds_nothing_left_is_recorded_as_finished_where_none_was(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").touch()
    config = CaptionJobConfig(
        input_path=str(tmp_path / "images"), output=str(tmp_path / "out"), model=ModelConfig(model="demo")
    )
    table = plan_job(config).table
    table.record("killed", {"model": {"name": "demo"}})  # after its last part, before its summary
    row = {"key": 0, "image_id": "a", "attempt": 1, "reason": "corrupt", "detail": "why"}
    table.write(pa.Table.from_pylist([row], captioned_schema()), Stamp("killed", table.digest))
    assert caption_images(config)["skipped_done"] == 1
    [rerun] = table.run_ids() - {"killed"}
    assert table.recorded(rerun)["summary"] == caption_images(config)
    assert table.run_ids() == {"killed", rerun}, "once a run is known to have finished, no more are recorded"


def test_an_output_that_cannot_be_reached_is_wrong_use_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jpg").touch()
    fault = Fault(RejectReason.FORBIDDEN, "NoCredentialsError: Unable to locate credentials")
    monkeypatch.setattr(CaptionTable, "identity", Mock(side_effect=StoreError(fault)))
    with pytest.raises(OutputError, match=r"output s3://b/out cannot be read or written: NoCredentialsError"):
        caption_images(CaptionJobConfig(input_path=str(tmp_path), output="s3://b/out", model=ModelConfig(model="demo")))
    with pytest.raises(OutputError, match=r"output s3://b/out cannot be read or written: NoCredentialsError"):
        verify(VerifyConfig(table="s3://b/out"))
