"""Rows for people and programs: a table, CSV, JSON lines, Parquet."""

import io
import json
from typing import get_args

import pyarrow as pa
import pyarrow.csv as pc_csv
import pyarrow.parquet as pq
import pytest

from captioner.config.query import RowFormat
from captioner.errors import ConfigError
from captioner.query import read_rows
from captioner.query.output import WRITERS, table_lines, without_formulas, write_rows
from captioner.tables import CaptionTable
from captioner.terminal import visible_lines

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


def test_csv_distinguishes_null_from_empty_and_holds_lists_as_json() -> None:
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


def test_json_escapes_what_commands_a_terminal_and_stays_what_it_is() -> None:
    odd = pa.table({"te\x9bxt": ["a\x1b[2J\x9b31m\u202e"]})
    file = io.BytesIO()
    write_rows(odd.to_reader(), file, "json")
    assert visible_lines(file.getvalue().decode()) == file.getvalue().decode()
    assert json.loads(file.getvalue()) == odd.to_pylist()[0]


def test_headers_of_a_table_hold_no_control_character() -> None:
    assert table_lines(pa.table({"a\x1b[2J\x9bb": [1]}).to_reader())[0] == "a\ufffd[2J\ufffdb"


def test_csv_can_be_made_safe_for_spreadsheets() -> None:
    texts = ["=1+1", "+a", "-a", "@SUM(1)", "\tx", "\rx", "plain =1", "", None]
    table = pa.table({"=text": texts, "n": [-1] * len(texts), "list": pa.array([["=1"]] * len(texts))})
    safe = without_formulas(table.to_reader()).read_all()
    assert safe.column_names == ["'=text", "n", "list"]
    assert safe["'=text"].to_pylist() == ["'=1+1", "'+a", "'-a", "'@SUM(1)", "'\tx", "'\rx", "plain =1", "", None]
    assert safe.drop_columns("'=text").equals(table.drop_columns("=text"))


def test_parquet_keeps_every_type() -> None:
    back = pq.read_table(io.BytesIO(written("parquet")))
    assert back.schema == ODD.schema
    assert back.drop_columns("score").equals(ODD.drop_columns("score"))


def test_a_column_that_parquet_cannot_hold_is_named(full: CaptionTable) -> None:
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
    with pytest.raises(ConfigError, match=r"two columns are called key; .* rename one with AS"):
        write_rows(read_rows(full, "SELECT key, key FROM captions").to_reader(), io.BytesIO(), "json")


def test_each_format_of_rows_that_a_user_may_choose_has_a_writer() -> None:
    assert set(get_args(RowFormat)) == {"auto", "table", *WRITERS}
