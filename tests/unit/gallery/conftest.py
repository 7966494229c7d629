"""A table of ten captions and two failures, and the content of the page that is made of it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from captioner.config import GalleryConfig
from captioner.gallery.gallery_job import gallery
from captioner.tables import CaptionTable
from tests.caption_tables import add_answers, add_part, begin_table, caption_row, failure_row, write_images


@pytest.fixture(autouse=True, scope="module")
def children(kept_decode_children: None) -> None:
    """Pages of a file share the processes that decode."""


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


def add_moods(table: CaptionTable, images: Path, moods: dict[int, str]) -> None:
    """Add the column of a prompt `mood` with these answers to a table."""
    details = {name: caption_row(0, "", "")[name] for name in ("num_tokens", "finish_reason", "min_logprob")}
    details |= {"mean_logprob": -3.0, "is_repetitive": True, "text_number": 0, "num_cut_values": 0}
    rows = [caption_row(n, f"{images}/{n:03d}.jpg", "", mood=mood, mood_details=details) for n, mood in moods.items()]
    add_answers(table, "mood", {"text": "What is its mood?", "decoding": {}}, rows)


def page_of(table: CaptionTable, tmp_path: Path, **flags: Any) -> dict[str, Any]:
    output = tmp_path / "out.html"
    gallery(GalleryConfig(table=str(table.location), output=str(output), **flags))
    return data_of(output)
