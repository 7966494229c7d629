"""Every command of jobs/query.py on a table of a million made-up captions."""

import json
import re
from pathlib import Path

import pyarrow.csv as pc_csv
import pyarrow.parquet as pq
import pytest

from captioner.config import GalleryConfig, QueryConfig
from captioner.gallery.gallery_job import gallery
from captioner.gallery.query_job import query_or_page
from captioner.query import query, read_rows
from captioner.tables import CaptionTable
from tests.bench.query import write_table

pytestmark = pytest.mark.slow
ROWS = 1_000_000


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> CaptionTable:
    return write_table(tmp_path_factory.mktemp("million") / "table", ROWS)


def test_a_million_rows_are_summarised(table: CaptionTable) -> None:
    summary = query(QueryConfig(table=str(table.location)))
    assert summary["images"] == ROWS
    assert summary["failed_by_reason"] == {"corrupt": summary["failed"]}
    assert sum(one["captions"] for one in summary["tokens_histogram"]) == summary["captioned"]
    assert 0.005 < summary["repetitive_share"] < 0.015
    assert summary["frequent_captions"][0]["n"] >= summary["frequent_captions"][-1]["n"] > 1
    lowest = [row["clip_score"] for row in summary["lowest"]["clip_score"]]
    assert lowest == sorted(lowest)


def test_all_rows_of_a_million_are_saved_in_each_form(table: CaptionTable, tmp_path: Path) -> None:
    sql = "SELECT key, image_id, caption, reason FROM images"
    for form in ("csv", "jsonl", "parquet"):
        assert (
            query(QueryConfig(table=str(table.location), sql=sql, out=str(tmp_path / f"rows.{form}")))["rows"] == ROWS
        )
    assert pq.read_metadata(tmp_path / "rows.parquet").num_rows == ROWS
    assert pc_csv.read_csv(tmp_path / "rows.csv").num_rows == ROWS
    with (tmp_path / "rows.jsonl").open() as lines:
        assert sum(1 for _ in lines) == ROWS


def test_the_most_doubtful_of_a_million_are_the_same_each_time(table: CaptionTable, tmp_path: Path) -> None:
    found = []
    for attempt in ("first.jsonl", "second.jsonl"):
        query(QueryConfig(table=str(table.location), review=200, out=str(tmp_path / attempt)))
        found.append((tmp_path / attempt).read_text().splitlines())
    assert found[0] == found[1]
    doubts = [json.loads(line)["doubt"] for line in found[0]]
    assert len(doubts) == 200
    assert doubts == sorted(doubts, reverse=True)


def test_a_page_of_a_million_is_a_sample_a_query_or_the_most_doubtful(table: CaptionTable, tmp_path: Path) -> None:
    out = str(tmp_path / "out.html")
    assert gallery(GalleryConfig(table=str(table.location), output=out, sample=100))["rows"] == 100
    sql = "SELECT key, length(caption) AS letters FROM captions ORDER BY letters DESC, key"
    assert gallery(GalleryConfig(table=str(table.location), output=out, sample=100, query=sql))["rows"] == 100
    assert query_or_page(QueryConfig(table=str(table.location), review=100, out=out))["rows"] == 100


def test_two_runs_of_a_million_are_compared(table: CaptionTable, tmp_path: Path) -> None:
    other = write_table(tmp_path / "other", ROWS, seed=1)
    config = GalleryConfig(
        table=str(table.location), output=str(tmp_path / "out.html"), sample=100, compare=str(other.location)
    )
    assert gallery(config)["rows"] == 100
    assert re.search(r"Of (19|20),\d{3} captions compared, (19|20),\d{3} differ", Path(config.output).read_text())


def test_one_image_of_a_million_is_found(table: CaptionTable) -> None:
    [row] = read_rows(table, "FROM images WHERE image_id = 's3://bucket/photos/0000777777.jpg'").to_pylist()
    assert row["key"] == 777_777
