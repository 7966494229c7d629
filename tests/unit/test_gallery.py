"""The gallery: which rows and pictures come on the page, and what it says where there is none."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from captioner.config import GalleryConfig
from captioner.errors import InputError
from captioner.gallery import gallery, write_gallery
from captioner.rows import row_key
from captioner.tables import CaptionTable
from tests.caption_tables import add_part, begin_table, caption_row, failure_row, write_images


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())
    assert found is not None
    return dict(json.loads(found.group(1)))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", 12)


@pytest.fixture
def table(tmp_path: Path, images: Path) -> CaptionTable:
    """Ten captions and two failures."""
    table, _ = begin_table(str(tmp_path / "captions"), str(images))
    rows = [caption_row(n, f"{images}/{n:03d}.jpg", f"a picture numbered {n}") for n in range(10)]
    add_part(table, rows + [failure_row(n, f"{images}/{n:03d}.jpg", "corrupt", "JPEG: cut short") for n in (10, 11)])
    return table


def page_of(table: CaptionTable, tmp_path: Path, **flags: Any) -> dict[str, Any]:
    output = tmp_path / "out.html"
    gallery(GalleryConfig(table=table.url, output=str(output), **flags))
    return data_of(output)


def test_every_row_of_a_small_table_comes_with_its_picture_or_its_reason(table: CaptionTable, tmp_path: Path) -> None:
    cards = page_of(table, tmp_path)["cards"]
    assert [card["id"].rpartition("/")[2] for card in cards] == [f"{n:03d}.jpg" for n in range(12)]
    assert [card["texts"][0]["runs"] for card in cards[:2]] == [
        [["same", "a picture numbered 0"]],
        [["same", "a picture numbered 1"]],
    ]
    assert {(card["picture"]["width"], card["picture"]["height"]) for card in cards[:10]} == {(48, 40)}
    assert [card["picture"] for card in cards[10:]] == [{"reason": "corrupt", "detail": "JPEG: cut short"}] * 2


def test_rows_of_a_query_come_in_their_order_with_their_own_columns_and_what_the_table_knows(
    table: CaptionTable, tmp_path: Path
) -> None:
    rows = pa.table({"key": [row_key(0, 7), row_key(0, 2), row_key(0, 10)], "doubt": [0.9, 0.5, 0.1]})
    summary = write_gallery(rows, str(tmp_path / "out.html"), table_url=table.url, title="Doubtful")
    cards = data_of(tmp_path / "out.html")["cards"]
    assert [card["id"].rpartition("/")[2] for card in cards] == ["007.jpg", "002.jpg", "010.jpg"]
    assert cards[0]["texts"][0]["runs"] == [["same", "a picture numbered 7"]]
    assert [card["facts"]["doubt"] for card in cards] == [0.9, 0.5, 0.1]
    assert (summary["rows"], summary["pictures"]) == (3, 2)


def test_rows_that_name_images_without_keys_are_found(table: CaptionTable, images: Path, tmp_path: Path) -> None:
    rows = pa.table({"image_id": [f"{images}/003.jpg"], "caption": ["another caption"]})
    write_gallery(rows, str(tmp_path / "out.html"), table_url=table.url)
    [card] = data_of(tmp_path / "out.html")["cards"]
    assert "data" in card["picture"]
    assert card["texts"][0]["runs"] == [["same", "another caption"]]


def test_rows_that_name_no_image_are_refused(table: CaptionTable, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="columns count; expected key or image_id"):
        write_gallery(pa.table({"count": [3]}), str(tmp_path / "out.html"), table_url=table.url)


def test_a_folder_that_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is no caption table; expected the OUTPUT of jobs/caption\.py"):
        gallery(GalleryConfig(table=str(tmp_path), output=str(tmp_path / "out.html")))


def test_an_image_that_is_gone_is_a_placeholder_with_its_reason(
    table: CaptionTable, images: Path, tmp_path: Path
) -> None:
    (images / "004.jpg").unlink()
    (images / "005.jpg").write_bytes(b"<html>no longer a picture</html>")
    cards = page_of(table, tmp_path)["cards"]
    assert [cards[4]["picture"]["reason"], cards[5]["picture"]["reason"]] == ["missing", "not_an_image"]
    assert cards[4]["texts"][0]["runs"] == [["same", "a picture numbered 4"]]
