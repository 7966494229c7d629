"""Tables to query: one without rows, and one with captions and failures."""

from pathlib import Path
from typing import Any

import pytest

from captioner.query import read_rows
from captioner.tables import CaptionTable
from tests.caption_tables import add_part, begin_table, caption_row, failure_row, write_images

RECORD = {
    "started": "2026-01-01T00:00:00Z",
    "model": {"name": "demo", "fingerprint": "abc"},
    "config": {"decoding": {"num_beams": 4}},
    "versions": {"ray": "2.60.0"},
    "summary": {"read": 3, "captioned": 2, "failed": 1, "failed_by_reason": {"corrupt": 1}, "seconds": 1.5},
}


@pytest.fixture
def table(tmp_path: Path) -> CaptionTable:
    """A table without rows, in a folder whose name SQL and globs might stumble over."""
    images = write_images(tmp_path / "images", 4)
    table, _ = begin_table(str(tmp_path / "it's a [1] table*"), str(images))
    return table


@pytest.fixture
def full(table: CaptionTable) -> CaptionTable:
    """Three captions, one of them after a failed attempt, and a failure with two attempts."""
    add_part(table, [caption_row(0, "a", "a dog"), failure_row(2, "c", "corrupt"), failure_row(3, "d", "fetch_failed")])
    again = {**failure_row(2, "c", "decode_timeout"), "attempt": 2}
    late = caption_row(3, "d", "a dog", finish_reason="length", min_logprob=-9.0, is_repetitive=True)
    add_part(table, [caption_row(1, "b", "a cat"), late, again], run_id="run-2")
    table.record("run-1", RECORD)
    table.record("run-2", {"started": "2026-01-02T00:00:00Z"})
    return table


def rows(table: CaptionTable, sql: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_rows(table, sql).to_pylist()
    return found
