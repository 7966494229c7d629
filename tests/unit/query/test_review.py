"""The most doubtful captions."""

import json
from pathlib import Path
from typing import Any

import pytest

from captioner.config import QueryConfig
from captioner.errors import ConfigError, InputError
from captioner.gallery.query_job import query_or_page
from captioner.query import query
from captioner.tables import CaptionTable
from tests.caption_tables import add_part, caption_row


def doubtful(table: CaptionTable, count: int) -> list[dict[str, Any]]:
    file = Path(table.location.local_path).parent / "doubtful.json"
    query(QueryConfig(table=str(table.location), review=count, out=str(file)))
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_most_doubtful_captions_come_first_and_say_why(table: CaptionTable) -> None:
    usual = [caption_row(key, f"usual-{key}", "x", mean_logprob=-0.5 - key / 1000) for key in range(100)]
    odd = [
        caption_row(100, "cut", "x", finish_reason="length"),
        caption_row(101, "loop", "x", is_repetitive=True, finish_reason="length"),
        caption_row(102, "unlikely", "x", mean_logprob=-3.0, clip_score=0.7),
    ]
    add_part(table, [*usual, *odd])
    found = doubtful(table, 4)
    assert [row["image_id"] for row in found[:3]] == ["unlikely", "loop", "cut"]
    assert [row["why"] for row in found] == [
        "low mean_logprob",
        "repetitive, truncated",
        "truncated",
        "low mean_logprob",
    ]
    assert found[3]["image_id"] == "usual-99"
    assert doubtful(table, 4) == found


def test_captions_that_clip_doubts_are_doubtful(table: CaptionTable) -> None:
    add_part(table, [caption_row(key, str(key), "x", clip_score=0.7 + key / 1000) for key in range(40)])
    add_part(table, [caption_row(40, "far off", "x", clip_score=0.1)])
    assert doubtful(table, 1)[0]["why"] == "low clip_score"


def test_equal_doubts_go_by_key(table: CaptionTable) -> None:
    add_part(table, [caption_row(key, str(key), "x") for key in (5, 3, 9)])
    assert [row["key"] for row in doubtful(table, 2)] == [3, 5]


def test_a_table_without_captions_has_none_to_review(table: CaptionTable) -> None:
    with pytest.raises(ConfigError, match="the table has no caption yet"):
        doubtful(table, 1)


def test_doubtful_captions_become_a_page_of_images(full: CaptionTable, tmp_path: Path) -> None:
    out = tmp_path / "review.html"
    summary = query_or_page(QueryConfig(table=str(full.location), review=2, out=str(out)))
    assert (summary["rows"], summary["pictures"]) == (2, 2)
    page = out.read_text()
    assert "The 2 most doubtful captions" in page
    assert "repetitive, truncated" in page


def test_rows_of_any_query_become_a_page_of_images(full: CaptionTable, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    sql = "SELECT key, 'mine' AS note FROM captions WHERE caption = 'a dog'"
    assert query_or_page(QueryConfig(table=str(full.location), sql=sql, out=str(out)))["rows"] == 2
    with pytest.raises(InputError, match="expected key or image_id among them"):
        query_or_page(QueryConfig(table=str(full.location), sql="SELECT 1 AS one", out=str(out)))
