"""SQL over a caption table: its views, what it may not do, and what a person is told who mistypes."""

import errno
import io
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.csv as pc_csv
import pyarrow.parquet as pq
import pytest

from captioner.command_line import run as command
from captioner.config import QueryConfig
from captioner.errors import ConfigError, InputError, JobError, OutputError
from captioner.query import query, read_rows
from captioner.query.output import table_lines, write_rows
from captioner.query.views import VIEWS, ask, select
from captioner.rows import CAPTIONS, FAILURES, captions_schema
from captioner.tables import CaptionTable, compact, open_table
from tests.caption_tables import add_part, begin_table, caption_row, failure_row, write_images
from tests.conftest import Bucket
from tests.pictures import encoded

ROOT = Path(__file__).parents[2]
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


# Views


def test_captions_attempts_failures_and_images_hold_what_their_names_say(full: CaptionTable) -> None:
    assert [row["key"] for row in rows(full, "FROM captions ORDER BY key")] == [0, 1, 3]
    attempts = rows(full, "SELECT key, attempt, reason FROM attempts ORDER BY ALL")
    assert [tuple(row.values()) for row in attempts] == [
        (2, 1, "corrupt"),
        (2, 2, "decode_timeout"),
        (3, 1, "fetch_failed"),
    ]
    assert [(row["key"], row["reason"]) for row in rows(full, "FROM failures")] == [(2, "decode_timeout")]
    images = rows(full, "FROM images ORDER BY key")
    assert [(row["key"], row["caption"], row["reason"]) for row in images] == [
        (0, "a dog", None),
        (1, "a cat", None),
        (2, None, "decode_timeout"),
        (3, "a dog", None),
    ]


def test_runs_are_flat_and_a_run_that_was_killed_has_no_counts(full: CaptionTable) -> None:
    first, second = rows(full, "SELECT *, config->>'$.decoding.num_beams' AS num_beams FROM runs ORDER BY run_id")
    assert (first["run_id"], first["model"], first["captioned"], first["seconds"]) == ("run-1", "demo", 2, 1.5)
    assert (first["num_beams"], json.loads(first["failed_by_reason"])) == ("4", {"corrupt": 1})
    assert str(first["started"]) == "2026-01-01 00:00:00"
    assert (second["is_finished"], second["captioned"], second["model"]) == (False, None, None)


def test_a_record_that_is_cut_is_a_run_of_nulls(full: CaptionTable) -> None:
    Path(full.run_folder, "runs", "run-2.json").write_text('{"started": "2026')
    assert rows(full, "SELECT started, is_finished FROM runs WHERE run_id = 'run-2'") == [
        {"started": None, "is_finished": False}
    ]


def test_a_table_without_rows_has_all_views_with_their_columns(table: CaptionTable) -> None:
    assert read_rows(table, "FROM captions").schema.names == CAPTIONS.names
    assert read_rows(table, "FROM attempts").schema.names == FAILURES.names
    assert all(rows(table, f"SELECT count(*) AS n FROM {view}") == [{"n": 0}] for view in VIEWS)


def test_a_table_of_failures_alone_has_images(table: CaptionTable) -> None:
    add_part(table, [failure_row(1, "b", "empty")])
    assert rows(table, "SELECT image_id, caption, reason FROM images") == [
        {"image_id": "b", "caption": None, "reason": "empty"}
    ]


def test_kept_columns_stand_before_run_id_under_their_own_types(table: CaptionTable) -> None:
    kept = [pa.field("order", pa.int16()), pa.field('odd "name"', pa.list_(pa.string()))]
    add_part(table, [caption_row(0, "a", "a dog", order=7, **{'odd "name"': ["x"]})], kept)
    found = read_rows(table, "FROM captions")
    assert found.schema.names == captions_schema(kept).names
    assert rows(table, 'SELECT "order", "odd ""name""" AS odd FROM captions') == [{"order": 7, "odd": ["x"]}]


def strip(table: CaptionTable, run_id: str, columns: list[str]) -> None:
    """Make the parts of a run what an older release wrote: without these columns, in candidates too."""
    for path in Path(table.url, "captions").glob(f"part-{run_id}-*"):
        old = pq.read_table(path).drop_columns(columns)
        pq.write_table(old, path)


def test_parts_of_an_older_release_have_nulls_where_a_column_was_not_there_yet(full: CaptionTable) -> None:
    strip(full, "run-1", ["clip_score", "is_repetitive"])
    assert read_rows(full, "FROM captions").schema.names == CAPTIONS.names
    flags = rows(full, "SELECT is_repetitive FROM captions ORDER BY key")
    assert [row["is_repetitive"] for row in flags] == [None, False, True]
    strip(full, "run-2", ["clip_score", "is_repetitive"])
    assert read_rows(full, "FROM captions").schema.names == CAPTIONS.names
    assert rows(full, "SELECT count(is_repetitive) AS n FROM images") == [{"n": 0}]


def test_many_parts_are_found_and_hidden_files_are_not(tmp_path: Path) -> None:
    table, _ = begin_table(str(tmp_path / "plain"), str(write_images(tmp_path / "images", 1)))
    for key in range(20):
        add_part(table, [caption_row(key, str(key), "x")])
    first = next(Path(table.url, "captions").iterdir())
    for hidden in (".part.parquet", "_part.parquet", ".part-x.tmp"):
        first.with_name(hidden).write_bytes(b"not Parquet")
    assert rows(table, "SELECT count(*) AS n, sum(key) AS s FROM captions") == [{"n": 20, "s": 190}]


def test_a_query_reads_of_the_parts_only_the_columns_and_row_groups_that_it_needs(full: CaptionTable) -> None:
    sql = "SELECT caption FROM captions WHERE key = 3"
    plan = ask(full, lambda connection: connection.execute(f"EXPLAIN {sql}").fetchall()[0][1])
    scan = plan[plan.index("READ_PARQUET") :]
    assert "Projections: caption" in scan
    assert "key = 3" in scan


# While a job writes


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
    """Let something happen while rows are being written, once; return what is told each time that they are begun."""
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


LARGE = 60 * 2_048


@pytest.fixture(scope="module")
def large_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "table"
    table, _ = begin_table(str(folder), str(write_images(folder.with_name("images"), 1)))
    for first in range(0, LARGE, 2_048):
        add_part(table, [caption_row(key, str(key), "a dog " * 80) for key in range(first, first + 2_048)])
    return folder


@pytest.fixture
def large(large_once: Path, tmp_path: Path) -> CaptionTable:
    """More parts than DuckDB opens ahead of what it gives, in a folder without a character that means a pattern."""
    return CaptionTable(str(shutil.copytree(large_once, tmp_path / "large")))


def move_parts(table: CaptionTable) -> None:
    """Give every part of a table another name, as a compaction on an object store does."""
    for path in Path(table.url, "captions").iterdir():
        path.rename(path.with_name(path.name.replace("part-", "part-moved-")))


@pytest.mark.parametrize("flags", [{"out": "rows.csv"}, {"out": "rows.json"}, {"out": "rows.parquet"}])
def test_an_export_whose_parts_are_taken_away_at_its_second_batch_is_begun_anew(
    large: CaptionTable, flags: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    begun = after_the_first_batch(monkeypatch, lambda: move_parts(large))
    assert query(QueryConfig(table=large.url, sql="SELECT key, caption FROM captions", **flags))["rows"] == LARGE
    assert len(begun) == 2
    out = Path(flags["out"])
    written = pq.read_metadata(out).num_rows if out.suffix == ".parquet" else num_lines(out) - (out.suffix == ".csv")
    assert written == LARGE


def test_rows_for_stdout_are_begun_anew_before_any_is_shown(
    large: CaptionTable, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = after_the_first_batch(monkeypatch, lambda: move_parts(large))
    query(QueryConfig(table=large.url, sql="SELECT key, caption FROM captions", format="json"))
    assert len(begun) == 2
    assert len({json.loads(line)["key"] for line in capfdbinary.readouterr().out.splitlines()}) == LARGE


def num_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def test_parts_that_go_away_for_good_in_the_middle_of_an_export_are_named_and_leave_no_file(
    large: CaptionTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_all() -> None:
        for path in Path(large.url, "captions").iterdir():
            path.write_bytes(path.read_bytes()[:100])

    after_the_first_batch(monkeypatch, cut_all)
    with pytest.raises(InputError, match=r"a part of .*/large cannot be read: .*; expected whole parts"):
        query(QueryConfig(table=large.url, sql="FROM captions", out=str(tmp_path / "out" / "rows.csv")))
    assert list((tmp_path / "out").iterdir()) == []


LATE = f"key = {LARGE - 9}"
EARLY = "key % 9 = 8"  # of a page and a table only the first rows are asked for, from whichever part they come


@pytest.mark.parametrize(
    ("flags", "is_wrong"),
    [({"out": "x.csv"}, LATE), ({"format": "json"}, LATE), ({"out": "x.html"}, EARLY), ({}, EARLY)],
)
def test_sql_that_fails_at_a_late_row_is_told_as_sql_that_fails_at_the_first(
    large: CaptionTable, flags: dict[str, str], is_wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sql = f"SELECT key, CASE WHEN {is_wrong} THEN caption ELSE '1' END::INTEGER AS x FROM captions"
    with pytest.raises(ConfigError, match=r"^the query failed: Conversion Error: Could not convert string"):
        query(QueryConfig(table=large.url, sql=sql, **flags))


def test_a_disk_without_room_is_named_and_is_no_damaged_part(
    full: CaptionTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    after_the_first_batch(monkeypatch, no_room)
    with pytest.raises(OutputError, match=r"--out .*rows.csv: No space left on device; expected a file"):
        query(QueryConfig(table=full.url, sql="FROM captions", out=str(tmp_path / "rows.csv")))
    after_the_first_batch(monkeypatch, no_room)
    with pytest.raises(JobError, match=r"gathered in .* first: No space left on device; .* that TMPDIR names"):
        query(QueryConfig(table=full.url, sql="FROM captions", format="csv"))


# What SQL may not do, and what is said


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELECT captoin FROM captions", r'"captoin" not found.*\n.*"caption".*\n.*The views are captions, failures'),
        ("FROM captionz", r'captionz does not exist!\nDid you mean "captions"'),
        ("FROM '/etc/passwd'", "does not exist"),
        ("SELEC 1", 'syntax error at or near "SELEC"'),
        ("SELECT 1; SELECT 2", "SQL holds 2 statements; expected one SELECT"),
        ("-- nothing", "SQL holds 0 statements; expected one SELECT"),
        ("COPY captions TO 'x.csv'", "SQL is COPY, and a caption table is only read"),
        ("ATTACH 'x.db'", "SQL is ATTACH"),
        ("INSTALL httpfs", "SQL is LOAD"),
        ("CREATE TABLE x AS SELECT 1", "SQL is CREATE"),
        ("EXPLAIN ANALYZE COPY captions TO 'x.csv'", "SQL is EXPLAIN"),
        ("SET threads = 1", "SQL is SET"),
        ("PIVOT captions ON finish_reason USING count(*)", "PIVOT without its values; expected them: PIVOT .* IN"),
        ("FROM read_csv('/etc/hostname')", "SQL reads this table and no other file.*/etc/hostname"),
        ("FROM read_parquet('s3://bucket/x.parquet')", "SQL reads this table and no other file"),
        ("FROM glob('/*')", "SQL reads this table and no other file"),
        ("SELECT caption::INTEGER FROM captions", "the query failed: Conversion Error: Could not convert string"),
        ("SELECT 'corrupt.parquet'::DATE FROM captions", "the query failed: Conversion Error"),
    ],
)
def test_wrong_sql_is_told_what_is_wrong_and_what_there_is(full: CaptionTable, sql: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s){message}"):
        read_rows(full, sql)


def test_a_variable_of_the_program_is_no_table(full: CaptionTable) -> None:
    def question(connection: Any) -> int:
        secret = pa.table({"x": [1]})
        return len(connection.sql("FROM secret").fetchall()) + secret.num_rows

    with pytest.raises(ConfigError, match="secret does not exist"):
        ask(full, question)


def test_a_damaged_part_is_named_without_the_sql_of_the_view(full: CaptionTable) -> None:
    part = min(Path(full.url, "captions").iterdir())
    part.write_bytes(part.read_bytes()[:-200])
    with pytest.raises(InputError, match=rf"{part.name}'; expected whole parts: see jobs/verify.py") as error:
        read_rows(full, "SELECT caption FROM captions")
    assert "LINE" not in str(error.value)


def test_a_part_whose_pages_are_damaged_is_told_from_wrong_sql(full: CaptionTable) -> None:
    part = min(Path(full.url, "captions").iterdir())
    data = bytearray(part.read_bytes())
    data[40:120] = bytes(80)
    part.write_bytes(data)
    with pytest.raises(InputError, match=r"a part of .* cannot be read: .*; expected whole parts"):
        read_rows(full, "SELECT max(key), max(image_id), max(caption), max(num_tokens) FROM captions")


def test_a_path_that_is_no_table_is_told_what_would_be_one(full: CaptionTable, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"images is no caption table; expected the OUTPUT of jobs/caption.py"):
        open_table(str(tmp_path / "images"), {})
    with pytest.raises(InputError, match=r"/captions is no caption table; .* and _run/ lie: .*table\*$"):
        open_table(full.url + "/captions", {})


# Rows for people and programs

ODD = pa.table(
    {
        "key": [1, 22, None],
        "caption": ["a dog " * 40, "", '猫と\n"犬", \x1b[31m'],
        "score": [1.23456789, float("nan"), None],
        "list": pa.array([[{"x": 1}], None, []]),
        "data": [b"\xff", None, b""],
    }
)


def written(form: str) -> bytes:
    file = io.BytesIO()
    assert write_rows(ODD.to_reader(), file, form) == 3
    return file.getvalue()


def test_csv_tells_null_from_empty_and_holds_lists_as_json() -> None:
    options = pc_csv.ConvertOptions(strings_can_be_null=True, quoted_strings_can_be_null=False)
    parse = pc_csv.ParseOptions(newlines_in_values=True)
    back = pc_csv.read_csv(io.BytesIO(written("csv")), parse_options=parse, convert_options=options)
    assert back["key"].to_pylist() == [1, 22, None]
    assert back["caption"].to_pylist() == ODD["caption"].to_pylist()
    assert back["list"].to_pylist() == ['[{"x": 1}]', None, "[]"]
    assert back["data"].to_pylist() == ["/w==", None, ""]


def test_json_is_an_object_a_line_and_strict() -> None:
    lines = [json.loads(line, parse_constant=pytest.fail) for line in written("json").splitlines()]
    assert lines[0] == {"key": 1, "caption": "a dog " * 40, "score": 1.23456789, "list": [{"x": 1}], "data": "/w=="}
    assert lines[1] == {"key": 22, "caption": "", "score": None, "list": None, "data": None}
    assert lines[2]["caption"] == ODD["caption"][2].as_py()


def test_parquet_keeps_every_type() -> None:
    back = pq.read_table(io.BytesIO(written("parquet")))
    assert back.schema == ODD.schema
    assert back.drop_columns("score").equals(ODD.drop_columns("score"))


def test_a_column_that_parquet_has_no_word_for_is_named(full: CaptionTable) -> None:
    rows = read_rows(full, "SELECT key, INTERVAL 1 DAY AS d FROM captions")
    with pytest.raises(ConfigError, match=r"^column d is month_day_nano_interval, .*; expected .*: d::VARCHAR AS d$"):
        write_rows(rows.to_reader(), io.BytesIO(), "parquet")


@pytest.mark.parametrize("width", [10, 40, 80, 200])
def test_a_table_is_no_wider_than_the_terminal_and_moves_no_cursor(width: int) -> None:
    lines = table_lines(ODD.to_reader(), width)
    table = [line for line in lines if not line.startswith("...")]
    wide = [sum(2 if ord(char) > 0x2E80 else 1 for char in line) for line in table]
    assert max(wide) <= width
    assert len(table) == 5
    assert all(line.isprintable() for line in lines)
    assert any("NU" in line for line in table)


def test_a_table_shows_the_first_rows_and_says_that_there_are_more() -> None:
    lines = table_lines(pa.table({"n": list(range(100))}).to_reader(), 80)
    assert (lines[0], lines[2], lines[41]) == (" n", " 0", "39")
    assert lines[-1].startswith("... the first 40 rows")


def test_two_columns_of_one_name_are_refused_where_they_would_be_one(full: CaptionTable) -> None:
    with pytest.raises(ConfigError, match=r"two columns are called key; .* give one another with AS"):
        write_rows(read_rows(full, "SELECT key, key FROM captions").to_reader(), io.BytesIO(), "json")


# The job


def run(full: CaptionTable, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(ROOT / "jobs" / "query.py"), full.url, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)})


def test_without_sql_the_table_is_summarised_and_the_last_line_is_json(
    full: CaptionTable, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = query(QueryConfig(table=full.url))
    assert (summary["images"], summary["captioned"], summary["failed"]) == (4, 3, 1)
    assert summary["failed_by_reason"] == {"decode_timeout": 1}
    assert summary["frequent_captions"] == [{"caption": "a dog", "n": 2}]
    assert (summary["repetitive_share"], summary["truncated_share"]) == (0.333333, 0.333333)
    assert summary["lowest"]["min_logprob"][0]["image_id"] == "d"
    assert summary["lowest"]["clip_score"] == []
    told = capsys.readouterr().err
    assert "4 images: 3 captioned, 1 failed" in told
    assert "run-1  demo  2 captioned, 1 failed" in told
    json.dumps(summary, allow_nan=False)


def test_a_table_without_captions_is_summarised_too(table: CaptionTable) -> None:
    empty = query(QueryConfig(table=table.url))
    assert (empty["images"], empty["mean_tokens"], empty["tokens_histogram"]) == (0, None, [])
    add_part(table, [failure_row(1, "b", "empty")])
    assert query(QueryConfig(table=table.url))["failed_by_reason"] == {"empty": 1}


def test_the_histogram_counts_each_caption_once_in_ten_bins_at_most(table: CaptionTable) -> None:
    add_part(table, [caption_row(key, str(key), "x", num_tokens=key) for key in range(1, 64)])
    bins = query(QueryConfig(table=table.url))["tokens_histogram"]
    assert len(bins) <= 10
    assert sum(one["captions"] for one in bins) == 63
    assert (bins[0]["from"], bins[-1]["to"]) == (1, 63)


def test_one_very_long_caption_leaves_the_bins_of_the_others_as_they_are(table: CaptionTable) -> None:
    lengths = [*(5 + key % 27 for key in range(999)), 4_096]
    add_part(table, [caption_row(key, str(key), "x", num_tokens=length) for key, length in enumerate(lengths)])
    bins = query(QueryConfig(table=table.url))["tokens_histogram"]
    assert [one["captions"] > 50 for one in bins] == [True] * 9 + [False]
    assert bins[-1] == {"from": 32, "to": 4_096, "captions": 1}
    assert sum(one["captions"] for one in bins) == 1_000


def test_scores_that_are_no_numbers_leave_the_summary_strict_json(table: CaptionTable) -> None:
    scores = [-0.5, float("nan"), float("-inf")]
    add_part(table, [caption_row(key, str(key), "x", mean_logprob=score) for key, score in enumerate(scores)])
    done = run(table)
    summary = json.loads(done.stdout.splitlines()[-1], parse_constant=pytest.fail)
    assert summary["mean_logprob"] == -0.5
    assert [row["mean_logprob"] for row in summary["lowest"]["mean_logprob"]] == [None, -0.5]


def test_of_a_long_name_the_end_is_shown(table: CaptionTable, capsys: pytest.CaptureFixture[str]) -> None:
    add_part(table, [caption_row(key, f"s3://a-bucket/with/a/long/prefix/{key}.jpg", "x") for key in range(3)])
    query(QueryConfig(table=table.url))
    told = capsys.readouterr().err
    assert all(f"/long/prefix/{key}.jpg" in told for key in range(3))


def test_a_query_that_is_interrupted_promises_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(config: QueryConfig) -> dict[str, Any]:
        raise KeyboardInterrupt

    for continues, told in ((True, "continues where this one stopped"), (False, "begins anew; nothing was written")):
        assert command(QueryConfig, interrupted, [], continues=continues) == 1
        assert told in capsys.readouterr().err
    assert "continues=False" in (ROOT / "jobs" / "query.py").read_text()


def test_images_that_need_other_options_come_on_a_page_of_doubtful_captions(s3: Bucket, tmp_path: Path) -> None:
    s3.put("photos/0.jpg", encoded())
    uris = tmp_path / "uris.txt"
    uris.write_text(f"{s3.url}/photos/0.jpg\n")
    table, _ = begin_table(str(tmp_path / "table"), str(uris))
    add_part(table, [caption_row(0, "0.jpg", "x")])
    out = str(tmp_path / "review.html")
    options = dict(s3.storage_options)
    found = query(QueryConfig(table=table.url, review=1, out=out, image_storage_options=options))
    assert found["pictures"] == 1


def test_rows_go_to_stdout_and_nothing_else_does(full: CaptionTable) -> None:
    done = run(full, "SELECT image_id, caption FROM captions ORDER BY key", "--format", "csv")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ['"image_id","caption"', '"a","a dog"', '"b","a cat"', '"d","a dog"']


def test_wrong_sql_exits_with_2_and_one_message(full: CaptionTable) -> None:
    done = run(full, "SELECT nope FROM captions")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith('error: Binder Error: Referenced column "nope" not found')


def test_rows_are_saved_whole_by_the_ending_of_the_file(full: CaptionTable, tmp_path: Path) -> None:
    out = tmp_path / "new" / "rows.parquet"
    summary = query(QueryConfig(table=full.url, sql="FROM captions", out=str(out)))
    assert (summary["rows"], pq.read_metadata(out).num_rows) == (3, 3)
    with pytest.raises(ConfigError):
        query(QueryConfig(table=full.url, sql="SELECT caption::INTEGER FROM captions", out=str(out)))
    assert pq.read_metadata(out).num_rows == 3
    assert [path.name for path in out.parent.iterdir()] == ["rows.parquet"]


def test_a_place_that_cannot_be_written_is_named(full: CaptionTable, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"--out .*/file/rows.csv: .*; expected a file that can be written"):
        query(QueryConfig(table=full.url, sql="FROM captions", out=str(tmp_path / "file" / "rows.csv")))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"review": 0}, "--review is 0; expected 1 to 5,000"),
        ({"review": 3, "sql": "FROM captions"}, "expected none with --review"),
        ({"out": "x.csv"}, "--out is x.csv; expected SQL or --review"),
        ({"format": "csv"}, "--format is csv; expected SQL or --review"),
        ({"sql": "FROM captions", "format": "parquet"}, "--format is parquet; expected --out FILE"),
        ({"sql": "FROM captions", "format": "table", "out": "x"}, "--format is table; expected csv"),
        ({"sql": "FROM captions", "out": "x.txt"}, "--out is x.txt; expected a name that ends in"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QueryConfig(**flags)


# Review


def doubtful(table: CaptionTable, count: int) -> list[dict[str, Any]]:
    file = Path(table.url).parent / "doubtful.json"
    query(QueryConfig(table=table.url, review=count, out=str(file)))
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


def test_doubtful_captions_become_a_page_of_pictures(full: CaptionTable, tmp_path: Path) -> None:
    out = tmp_path / "review.html"
    summary = query(QueryConfig(table=full.url, review=2, out=str(out)))
    assert (summary["rows"], summary["pictures"]) == (2, 2)
    page = out.read_text()
    assert "The 2 most doubtful captions" in page
    assert "repetitive, truncated" in page


def test_rows_of_any_query_become_a_page_of_pictures(full: CaptionTable, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    sql = "SELECT key, 'mine' AS note FROM captions WHERE caption = 'a dog'"
    assert query(QueryConfig(table=full.url, sql=sql, out=str(out)))["rows"] == 2
    with pytest.raises(InputError, match="expected key or image_id among them"):
        query(QueryConfig(table=full.url, sql="SELECT 1 AS one", out=str(out)))
