"""Rows of a query for a terminal, as CSV, as JSON lines or as Parquet.

    table      as wide as the terminal, the first rows; a null is NULL
    csv        a header; a null is empty and an empty text is ""; lists and structs as JSON, bytes as base64
    json       one object a line
    parquet    as DuckDB types them

Rows are streamed: only the one batch being written is held. Knows Arrow and text; not where rows come from.
"""

import base64
import io
import json
import math
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from itertools import islice
from typing import IO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pc_csv
import pyarrow.parquet as pq

from captioner.errors import ConfigError
from captioner.terminal import visible

__all__ = ["WRITERS", "finite", "table_lines", "without_formulas", "write_rows"]

_MAX_LINES = 40  # rows that a terminal shows
_MAX_CELL = 200  # characters of one value that may be shown
_PIPE_WIDTH = 160  # where stdout is no terminal
_NULL = "NULL"
# JSON leaves these as they are; some terminals obey them
_COMMANDS = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_FORMULA = r"^[=+\-@\t\r]"  # what a spreadsheet takes for the start of a formula


def write_rows(rows: pa.RecordBatchReader, file: IO[bytes], form: str) -> int:
    """Write all rows in one of WRITERS' forms and return how many.

    Raises ConfigError for two columns with the same name, except in CSV, and for types that the form cannot hold."""
    names = rows.schema.names
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice and form != "csv":
        raise ConfigError(f"two columns are called {twice[0]}; expected different names: rename one with AS")
    return WRITERS[form](rows, file)


def _write_csv(rows: pa.RecordBatchReader, file: IO[bytes]) -> int:
    kinds = [pa.string() if _is_encoded(kind) else kind for kind in rows.schema.types]
    schema = pa.schema([pa.field(name, kind) for name, kind in zip(rows.schema.names, kinds, strict=True)])
    num_rows = 0
    with pc_csv.CSVWriter(file, schema) as writer:
        for batch in rows:
            writer.write_batch(pa.record_batch([_encode(column) for column in batch.columns], schema))
            num_rows += batch.num_rows
    return num_rows


def _write_json(rows: pa.RecordBatchReader, file: IO[bytes]) -> int:
    num_rows = 0
    for batch in rows:
        file.writelines(_json(row).encode() + b"\n" for row in batch.to_pylist())
        num_rows += batch.num_rows
    return num_rows


def _write_parquet(rows: pa.RecordBatchReader, file: IO[bytes]) -> int:
    for field in rows.schema:
        _check_parquet(field)
    num_rows = 0
    with pq.ParquetWriter(file, rows.schema, compression="zstd") as writer:
        for batch in rows:
            writer.write_batch(batch)
            num_rows += batch.num_rows
    return num_rows


def _check_parquet(field: pa.Field) -> None:
    try:
        pq.write_table(pa.schema([field]).empty_table(), io.BytesIO())
    except pa.ArrowNotImplementedError as error:
        raise ConfigError(
            f"column {field.name} is {field.type}, which Parquet cannot hold; expected another type:"
            f" {field.name}::VARCHAR AS {field.name}"
        ) from error


def without_formulas(rows: pa.RecordBatchReader) -> pa.RecordBatchReader:
    """Return rows whose texts a spreadsheet takes for no formula: `'` stands before one that begins like a formula."""
    names = [f"'{name}" if re.match(_FORMULA, name) else name for name in rows.schema.names]
    schema = pa.schema(list(zip(names, rows.schema.types, strict=True)))
    batches = (pa.record_batch(list(map(_without_formulas, batch.columns)), schema) for batch in rows)
    return pa.RecordBatchReader.from_batches(schema, batches)


def _without_formulas(column: pa.Array) -> pa.Array:
    if not pa.types.is_string(column.type):
        return column
    return pc.if_else(pc.match_substring_regex(column, _FORMULA), pc.binary_join_element_wise("'", column, ""), column)


WRITERS: Mapping[str, Callable[[pa.RecordBatchReader, IO[bytes]], int]] = {
    "csv": _write_csv,
    "json": _write_json,
    "parquet": _write_parquet,
}


# Values


def _is_encoded(kind: pa.DataType) -> bool:
    """Return True if a CSV holds values of this type as JSON or base64 rather than as they are."""
    plain = (pa.types.is_boolean, pa.types.is_string, pa.types.is_timestamp, pa.types.is_date)
    return not (_is_number(kind) or any(is_of(kind) for is_of in plain))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _encode(column: pa.Array) -> pa.Array:
    if not _is_encoded(column.type):
        return column
    return pa.array([None if value is None else _text(value) for value in column.to_pylist()], pa.string())


def _text(value: object) -> str:
    """Return a value on one line: text as it is, lists and structs as JSON."""
    return str(finite(value)) if not isinstance(value, list | dict) else _json(value)


def _json(value: object) -> str:
    """Return a value as JSON. What would command a terminal is escaped, so that the value stays the same."""
    text = json.dumps(finite(value), ensure_ascii=False, allow_nan=False)
    return _COMMANDS.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


def finite(value: object) -> object:
    """Return a value that JSON can hold: NaN as null, bytes as base64, times as text, decimals as numbers."""
    if isinstance(value, dict):
        return {str(name): finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return str(value) if isinstance(value, timedelta) or not isinstance(value, str | int | None) else value


# A table for people


def table_lines(rows: pa.RecordBatchReader, width: int | None = None) -> list[str]:
    """Return the first rows as lines no wider than `width`, by default the terminal's; the last one says if more are.

    Columns that do not fit are cut, the widest first; the number of columns left out is stated."""
    cells = list(islice((row for batch in rows for row in _rows(batch)), _MAX_LINES + 1))
    room = width or shutil.get_terminal_size((_PIPE_WIDTH, 0)).columns
    header = [visible(name[:_MAX_CELL]) for name in rows.schema.names]
    lines = _laid_out(
        [header, *cells[:_MAX_LINES]],
        [_is_number(kind) for kind in rows.schema.types],
        room,
    )
    if len(cells) > _MAX_LINES:
        lines.append(f"... the first {_MAX_LINES} rows; --format csv, json or --out FILE give all, LIMIT fewer")
    return lines


def _rows(batch: pa.RecordBatch) -> Iterable[list[str]]:
    columns = [[_shown(value) for value in column.slice(0, _MAX_LINES + 1).to_pylist()] for column in batch.columns]
    return (list(row) for row in zip(*columns, strict=True))


def _shown(value: object) -> str:
    """Return a value as a cell shows it, on one line."""
    if value is None:
        return _NULL
    text = f"{value:.6g}" if isinstance(value, float) else _text(value)
    return visible(text[:_MAX_CELL])


def _laid_out(rows: list[list[str]], is_number: list[bool], room: int) -> list[str]:
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    num_shown = min(len(widths), max(1, (room + 2) // 5))  # a column less than three wide is of no use
    widths = _fitted(widths[:num_shown], room)
    left_out = len(rows[0]) - num_shown
    lines = [_line(row[:num_shown], widths, is_number) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines + ([f"... and {left_out} more columns: name those you want"] if left_out else [])


def _fitted(widths: list[int], room: int) -> list[int]:
    """Return widths whose sum, with two spaces between columns, is at most `room`: the widest are cut first."""
    left, fitted = room - 2 * (len(widths) - 1), [0] * len(widths)
    narrow_first = sorted(range(len(widths)), key=widths.__getitem__)
    for num_left, column in zip(range(len(widths), 0, -1), narrow_first, strict=True):
        fitted[column] = max(1, min(widths[column], left // num_left))
        left -= fitted[column]
    return fitted


def _line(cells: list[str], widths: list[int], is_number: list[bool]) -> str:
    padded = []
    for cell, width, right in zip(cells, widths, is_number, strict=False):
        shown = _cut(cell, width)
        space = " " * (width - _width(shown))
        padded.append(space + shown if right else shown + space)
    return "  ".join(padded).rstrip()


def _cut(text: str, width: int) -> str:
    if _width(text) <= width:
        return text
    kept, used = "", 1
    for char in text:
        used += _width(char)
        if used > width:
            break
        kept += char
    return kept + "…"


def _width(text: str) -> int:
    """Return the columns that a text takes on a terminal: two for a wide character, none for one that combines."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF") for char in text)
