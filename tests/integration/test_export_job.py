"""An export that reads images, on a real Ray: the files of one without it."""

from pathlib import Path

import pytest

from captioner.cluster.export_pipeline import export_captions
from captioner.config import ExportConfig
from captioner.errors import JobError
from captioner.export import export_table
from tests.caption_tables import add_part, begin_table, caption_row, write_images
from tests.unit.export.conftest import files_of

pytestmark = [
    pytest.mark.usefixtures("on_ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of Ray's own sockets, when a driver leaves its cluster
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),  # Ray Data copies its own deprecated settings
]


def test_shards_are_written_by_tasks_and_are_those_of_one_process(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 12)
    table, _ = begin_table(str(tmp_path / "table"), str(images))
    add_part(table, [caption_row(number, f"{number:03d}.jpg", f"caption {number}") for number in range(12)])
    flags = {"table": str(tmp_path / "table"), "format": "webdataset", "rows_per_file": 3, "workers": "2"}
    alone = export_table(ExportConfig(**flags, output=str(tmp_path / "alone")))
    images.rename(tmp_path / "away")
    with pytest.raises(JobError, match="cannot be read: fetch_failed"):
        export_captions(ExportConfig(**flags, output=str(tmp_path / "on-ray")))
    (tmp_path / "away").rename(images)
    on_ray = export_captions(ExportConfig(**flags, output=str(tmp_path / "on-ray")))
    assert (on_ray["rows"], on_ray["refused"]) == (alone["rows"], {}) == (12, {})
    assert files_of(tmp_path / "on-ray") == files_of(tmp_path / "alone")
    assert len(files_of(tmp_path / "alone")) == 4
