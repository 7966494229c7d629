"""Formats that hold the images: bytes untouched, named by their keys, read back by the readers of each."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from captioner.config import ExportConfig, ImageAccessConfig
from captioner.errors import JobError
from captioner.export import export_table
from captioner.export.samples import image_suffix, sample_name
from captioner.tables import CaptionTable
from tests.caption_tables import add_part, begin_table, caption_row
from tests.faults.conftest import tar_of
from tests.sample_images import encoded
from tests.unit.export.conftest import CAPTIONS, NAMES, Export, files_of

pytestmark = [  # the webdataset library leaves the tars open that it has read
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
TEXT_OF = {name: text for name, text in zip(NAMES, CAPTIONS, strict=True) if text}


def one_line(text: str) -> str:
    return text.replace("\n", " ")


def samples_of(folder: Path) -> list[dict[str, Any]]:
    """Return every sample, read by the webdataset library."""
    webdataset = pytest.importorskip("webdataset")
    tars = sorted(map(str, folder.glob("*.tar")))
    return list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))


def test_webdataset_holds_the_images_as_they_are(export: Export, tmp_path: Path) -> None:
    export(format="webdataset")
    found = samples_of(tmp_path / "out")
    assert [one["__key__"] for one in found] == [sample_name(key) for key in (0, 1, 2, 4)]
    columns = [json.loads(one["json"]) for one in found]
    assert {row["image_id"]: row["caption"] for row in columns} == TEXT_OF
    for sample, row in zip(found, columns, strict=True):
        assert sample["jpg"] == (tmp_path / "images" / row["image_id"]).read_bytes()
        assert sample["txt"].decode() == one_line(TEXT_OF[row["image_id"]]) + "\n"


def test_shards_are_cut_by_images_and_by_bytes(export: Export, tmp_path: Path) -> None:
    export(format="webdataset", rows_per_file=3)
    export(format="webdataset", bytes_per_file=1_800, output=str(tmp_path / "small"))  # the rows say 900 bytes each
    assert [len(samples_of(tmp_path / "out")), len(list((tmp_path / "out").glob("*.tar")))] == [4, 2]
    assert [path.name for path in sorted((tmp_path / "small").glob("*.tar"))] == [
        "captions-00000.tar",
        "captions-00001.tar",
    ]


def test_captions_alone_need_no_image(export: Export, tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / "images" / name).unlink()
    export(format="webdataset", images=False)
    found = samples_of(tmp_path / "out")
    assert [sorted(one.keys() - {"__key__", "__url__", "__local_path__"}) for one in found] == [["json", "txt"]] * 4


def test_an_image_that_is_gone_is_counted_and_left_out(export: Export, tmp_path: Path) -> None:
    (tmp_path / "images" / "a" / "x.jpg").unlink()
    assert export(format="webdataset")["refused"] == {"image_missing": 1}
    assert len(samples_of(tmp_path / "out")) == 3


def test_a_folder_that_is_away_ends_the_job_so_that_nothing_is_left_out(export: Export, tmp_path: Path) -> None:
    (tmp_path / "images").rename(tmp_path / "away")
    with pytest.raises(JobError, match="cannot be read: fetch_failed"):
        export(format="webdataset")
    moved = export(
        format="webdataset",
        image_access=ImageAccessConfig(image_root=str(tmp_path / "away")),
        output=str(tmp_path / "of the moved"),
    )
    assert moved["rows"] == 4
    (tmp_path / "away").rename(tmp_path / "images")
    assert export(format="webdataset")["rows"] == 4


def test_images_in_tars_are_read_again_too(tmp_path: Path) -> None:
    images = [encoded(seed=seed) for seed in range(4)]
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "000.tar").write_bytes(tar_of(images))
    table, _ = begin_table(str(tmp_path / "table"), str(tmp_path / "images"))
    add_part(table, [caption_row(position, f"000.tar/{position}", f"caption {position}") for position in (1, 3)])
    config = ExportConfig(table=str(tmp_path / "table"), output=str(tmp_path / "out"), format="webdataset")
    assert export_table(config)["rows"] == 2
    assert [one["jpg"] for one in samples_of(tmp_path / "out")] == [images[1], images[3]]


def test_the_same_rows_give_the_same_bytes(table: CaptionTable, export: Export, tmp_path: Path) -> None:
    export(format="webdataset")
    export(format="webdataset", output=str(tmp_path / "again"))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "again")
    with tarfile.open(tmp_path / "out" / "captions-00000.tar") as tar:
        assert {(member.mtime, member.uid, member.uname) for member in tar} == {(0, 0, "")}


@pytest.mark.parametrize(
    ("image_id", "data", "suffix"),
    [("a.PNG", b"", ".png"), ("hash", encoded(), ".jpg"), ("a.php?x=1", b"\x89PNG\r\n", ".png"), ("a", b"?", ".jpg")],
)
def test_the_suffix_of_an_image_is_that_of_its_name_else_of_its_bytes(image_id: str, data: bytes, suffix: str) -> None:
    assert image_suffix(image_id, data) == suffix
