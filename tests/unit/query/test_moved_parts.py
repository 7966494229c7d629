"""Queries while a job writes, repairs or compacts the table."""

import errno
import functools
import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.config import QueryConfig
from captioner.errors import ConfigError, InputError, JobError, OutputError
from captioner.gallery.query_job import query_or_page
from captioner.query import query
from captioner.query.output import write_rows
from captioner.query.views import ask, select
from captioner.tables import CaptionTable, compact
from tests.caption_tables import add_part, begin_table, caption_row, write_images
from tests.unit.query.conftest import rows


def compacted(table: CaptionTable) -> None:
    """Put one part in the place of all."""
    with table.take_lease("compact") as lease:
        table.record(lease.run_id, {})
        assert compact(table, lease.run_id)["captions"] == (2, 1)


def test_a_query_whose_parts_are_taken_away_is_asked_again_of_those_that_are_there(full: CaptionTable) -> None:
    asked = []

    def question(connection: Any) -> int:
        asked.append(connection)
        if len(asked) == 1:
            compacted(full)
        return select(connection, "SELECT key FROM captions").to_arrow_table().num_rows

    assert ask(full, question) == 3
    assert len(asked) == 2


def test_queries_while_a_job_writes_see_whole_parts_and_each_row_once(table: CaptionTable) -> None:
    stop = threading.Event()

    def write() -> None:
        for part in range(40):
            add_part(table, [caption_row(10 * part + row, f"{part}-{row}", "x") for row in range(10)])
        stop.set()

    writer = threading.Thread(target=write)
    writer.start()
    counts = []
    while not stop.is_set():
        [found] = rows(table, "SELECT count(*) AS n, count(DISTINCT key) AS keys FROM images")
        assert found["n"] == found["keys"]
        assert found["n"] % 10 == 0
        counts.append(found["n"])
    writer.join()
    assert counts == sorted(counts)
    assert rows(table, "SELECT count(*) AS n FROM images") == [{"n": 400}]


def after_the_first_batch(monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], None]) -> list[str]:
    """Let something happen while rows are being written, once; return the form each time that writing starts."""
    begun: list[str] = []

    def write(rows: pa.RecordBatchReader, file: IO[bytes], form: str) -> int:
        begun.append(form)

        def batches() -> Iterator[pa.RecordBatch]:
            first = next(rows)
            if len(begun) == 1:
                meanwhile()
            yield first
            yield from rows

        return write_rows(pa.RecordBatchReader.from_batches(rows.schema, batches()), file, form)

    monkeypatch.setattr(sys.modules[query.__module__], "write_rows", write)
    return begun


ROWS = 512  # a part
LARGE = 60 * ROWS


@pytest.fixture(scope="module")
def large_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "table"
    table, _ = begin_table(str(folder), str(write_images(folder.with_name("images"), 1)))
    for first in range(0, LARGE, ROWS):
        add_part(table, [caption_row(key, str(key), "a dog " * 80) for key in range(first, first + ROWS)])
    return folder


@pytest.fixture
def large(large_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CaptionTable:
    """More parts than DuckDB opens ahead of the rows it returns, in a folder without a character of a pattern.

    A part that is open stays readable when it is moved. Each thread of DuckDB opens up to 20 parts ahead, so that
    several of them, given time, open all: it gets one."""
    monkeypatch.setattr(duckdb, "connect", functools.partial(one_thread, duckdb.connect))
    monkeypatch.setattr(sys.modules[query.__module__], "_BATCH_ROWS", 4 * ROWS)
    return CaptionTable(str(shutil.copytree(large_once, tmp_path / "large")))


def one_thread(connect: Callable[..., duckdb.DuckDBPyConnection], config: Any) -> duckdb.DuckDBPyConnection:
    return connect(config={**config, "threads": 1})


def move_parts(table: CaptionTable) -> None:
    """Give every part of a table another name, as a compaction on an object store does."""
    for path in Path(table.location.local_path, "captions").iterdir():
        path.rename(path.with_name(path.name.replace("part-", "part-moved-")))


@pytest.mark.parametrize("flags", [{"out": "rows.csv"}, {"out": "rows.json"}, {"out": "rows.parquet"}])
def test_an_export_whose_parts_are_moved_after_its_first_batch_starts_again(
    large: CaptionTable, flags: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    begun = after_the_first_batch(monkeypatch, lambda: move_parts(large))
    assert (
        query(QueryConfig(table=str(large.location), sql="SELECT key, caption FROM captions", **flags))["rows"] == LARGE
    )
    assert len(begun) == 2
    out = Path(flags["out"])
    written = pq.read_metadata(out).num_rows if out.suffix == ".parquet" else num_lines(out) - (out.suffix == ".csv")
    assert written == LARGE


def test_rows_for_stdout_start_again_before_any_is_shown(
    large: CaptionTable, capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = after_the_first_batch(monkeypatch, lambda: move_parts(large))
    query(QueryConfig(table=str(large.location), sql="SELECT key, caption FROM captions", format="json"))
    assert len(begun) == 2
    shown = capsysbinary.readouterr().out
    assert shown.startswith(b"{"), shown[:200]
    assert len({json.loads(line)["key"] for line in shown.splitlines()}) == LARGE


def num_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def test_parts_that_go_away_for_good_in_the_middle_of_an_export_are_named_and_leave_no_file(
    large: CaptionTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_all() -> None:
        for path in Path(large.location.local_path, "captions").iterdir():
            path.write_bytes(path.read_bytes()[:100])

    after_the_first_batch(monkeypatch, cut_all)
    with pytest.raises(InputError, match=r"a part of .*/large cannot be read: .*; expected whole parts"):
        query(QueryConfig(table=str(large.location), sql="FROM captions", out=str(tmp_path / "out" / "rows.csv")))
    assert list((tmp_path / "out").iterdir()) == []


LATE = f"key = {LARGE - 9}"
EARLY = "key % 9 = 8"  # of a page and a table only the first rows are asked for, from whichever part they come


@pytest.mark.parametrize(
    ("flags", "is_wrong"),
    [({"out": "x.csv"}, LATE), ({"format": "json"}, LATE), ({"out": "x.html"}, EARLY), ({}, EARLY)],
)
def test_sql_that_fails_at_a_late_row_has_the_message_of_sql_that_fails_at_the_first(
    large: CaptionTable, flags: dict[str, str], is_wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sql = f"SELECT key, CASE WHEN {is_wrong} THEN caption ELSE '1' END::INTEGER AS x FROM captions"
    with pytest.raises(ConfigError, match=r"^the query failed: Conversion Error: Could not convert string"):
        query_or_page(QueryConfig(table=str(large.location), sql=sql, **flags))


def test_a_disk_without_room_is_named_and_is_no_damaged_part(
    full: CaptionTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    after_the_first_batch(monkeypatch, no_room)
    with pytest.raises(OutputError, match=r"--out .*rows.csv: No space left on device; expected a file"):
        query(QueryConfig(table=str(full.location), sql="FROM captions", out=str(tmp_path / "rows.csv")))
    after_the_first_batch(monkeypatch, no_room)
    with pytest.raises(JobError, match=r"gathered in .* first: No space left on device; .* that TMPDIR names"):
        query(QueryConfig(table=str(full.location), sql="FROM captions", format="csv"))
