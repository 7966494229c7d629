"""SQL over a caption table: its views, what it may not do, and the messages for wrong SQL."""

import json
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.errors import ConfigError, InputError
from captioner.query import read_rows
from captioner.query.views import VIEWS, ask
from captioner.schema import CAPTIONS, FAILURES, captions_schema
from captioner.tables import CaptionTable, open_table
from tests.caption_tables import add_part, begin_table, caption_row, failure_row, write_images
from tests.unit.query.conftest import rows


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
    Path(full.run_folder.local_path, "runs", "run-2.json").write_text('{"started": "2026')
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


def test_kept_columns_come_before_run_id_under_their_own_types(table: CaptionTable) -> None:
    kept = [pa.field("order", pa.int16()), pa.field('odd "name"', pa.list_(pa.string()))]
    add_part(table, [caption_row(0, "a", "a dog", order=7, **{'odd "name"': ["x"]})], kept)
    found = read_rows(table, "FROM captions")
    assert found.schema.names == captions_schema(kept).names
    assert rows(table, 'SELECT "order", "odd ""name""" AS odd FROM captions') == [{"order": 7, "odd": ["x"]}]


def strip(table: CaptionTable, run_id: str, columns: list[str]) -> None:
    """Make the parts of a run what an older release wrote: without these columns, in candidates too."""
    for path in Path(table.location.local_path, "captions").glob(f"part-{run_id}-*"):
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
    first = next(Path(table.location.local_path, "captions").iterdir())
    for hidden in (".part.parquet", "_part.parquet", ".part-x.tmp"):
        first.with_name(hidden).write_bytes(b"not Parquet")
    assert rows(table, "SELECT count(*) AS n, sum(key) AS s FROM captions") == [{"n": 20, "s": 190}]


def test_a_query_reads_of_the_parts_only_the_columns_and_row_groups_that_it_needs(full: CaptionTable) -> None:
    sql = "SELECT caption FROM captions WHERE key = 3"
    plan = ask(full, lambda connection: connection.execute(f"EXPLAIN {sql}").fetchall()[0][1])
    scan = plan[plan.index("READ_PARQUET") :]
    assert "Projections: caption" in scan
    assert "key = 3" in scan


# What SQL may not do


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
def test_wrong_sql_is_refused_naming_what_is_wrong_and_what_there_is(
    full: CaptionTable, sql: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"(?s){message}"):
        read_rows(full, sql)


WRITING = [
    "WITH x AS (COPY (SELECT 1 AS key) TO 'PART' (FORMAT parquet)) SELECT * FROM x",
    "WITH x AS MATERIALIZED (COPY captions TO 'PART.new') SELECT 1",
    "WITH x AS (COPY captions TO 'TABLE/captions/new.parquet') SELECT 1",
    "WITH x AS (INSERT INTO runs BY NAME SELECT 'x' AS run_id RETURNING *) FROM x",
    "WITH x AS (DELETE FROM runs RETURNING *) FROM x",
    "WITH x AS (UPDATE runs SET run_id = 'x' RETURNING *) FROM x",
]
REFUSED = [
    "FROM query('WITH x AS (COPY captions TO ''PART'') SELECT 1')",
    "SELECT (WITH x AS (COPY captions TO 'PART') SELECT 1)",
    "EXPORT DATABASE 'TABLE/captions'",
    "EXPLAIN ANALYZE COPY captions TO 'PART'",
    "ATTACH 'TABLE/captions/x.db'",
    "LOAD httpfs",
    "PRAGMA threads = 1",
    "CALL enable_logging()",
    "FROM enable_logging('QueryLog', storage = 'file', storage_path = 'TABLE/captions/')",
    "FROM read_text('TABLE/captions/../_run/run.json')",
    "FROM read_csv('TABLE/_run/run.json')",
    "FROM read_blob('part://_run/run.json')",
    "FROM read_duckdb('TABLE/captions/x.db')",
]


@pytest.mark.parametrize("sql", [*WRITING, *REFUSED])
def test_no_sql_writes_a_file_or_reads_one_that_is_no_part(full: CaptionTable, sql: str) -> None:
    folder = Path(full.location.local_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    quoted = str(folder).replace("'", "''")
    sql = sql.replace("TABLE", quoted).replace("PART", "part://captions/" + min((folder / "captions").iterdir()).name)
    with pytest.raises((ConfigError, InputError), match="only read" if sql.startswith("WITH") else None):
        read_rows(full, sql)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["part://captions/NAME", "part://captions/new.parquet", "FOLDER/captions/NAME"])
def test_a_write_that_the_tree_of_the_sql_does_not_show_finds_parts_that_are_only_read(
    full: CaptionTable, name: str
) -> None:
    folder = Path(full.location.local_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    target = name.replace("FOLDER", str(folder)).replace("NAME", min((folder / "captions").iterdir()).name)
    writer = f"WITH x AS (COPY (SELECT 1 AS key) TO '{target.replace(chr(39), 2 * chr(39))}') SELECT 1"
    with duckdb.connect() as connection:
        [[tree]] = connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [writer]).fetchall()
    with pytest.raises(ConfigError, match="SQL reads this table and no other file"):
        read_rows(full, f"FROM json_execute_serialized_sql('{tree.replace(chr(39), 2 * chr(39))}')")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_text_that_looks_like_the_tree_of_a_writer_is_a_text(full: CaptionTable) -> None:
    assert rows(full, """SELECT '"type":"COPY_QUERY_NODE"' AS x""") == [{"x": '"type":"COPY_QUERY_NODE"'}]


def test_a_variable_of_the_program_is_no_table(full: CaptionTable) -> None:
    def question(connection: Any) -> int:
        secret = pa.table({"x": [1]})
        return len(connection.sql("FROM secret").fetchall()) + secret.num_rows

    with pytest.raises(ConfigError, match="secret does not exist"):
        ask(full, question)


def test_a_damaged_part_is_named_without_the_sql_of_the_view(full: CaptionTable) -> None:
    part = min(Path(full.location.local_path, "captions").iterdir())
    part.write_bytes(part.read_bytes()[:-200])
    with pytest.raises(InputError, match=rf"{part.name}'; expected whole parts: see jobs/verify.py") as error:
        read_rows(full, "SELECT caption FROM captions")
    assert "LINE" not in str(error.value)


def test_a_part_whose_pages_are_damaged_is_not_taken_for_wrong_sql(full: CaptionTable) -> None:
    part = min(Path(full.location.local_path, "captions").iterdir())
    data = bytearray(part.read_bytes())
    data[40:120] = bytes(80)
    part.write_bytes(data)
    with pytest.raises(InputError, match=r"a part of .* cannot be read: .*; expected whole parts"):
        read_rows(full, "SELECT max(key), max(image_id), max(caption), max(num_tokens) FROM captions")


def test_a_path_that_is_no_table_is_refused_naming_one_that_is(full: CaptionTable, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"images is no caption table; expected the OUTPUT of jobs/caption.py"):
        open_table(str(tmp_path / "images"))
    with pytest.raises(InputError, match=r"/captions is no caption table; .* and _run/ lie: .*table\*$"):
        open_table(str(full.location) + "/captions")
