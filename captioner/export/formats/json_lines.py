"""`jsonl`: a JSON object a line, with the columns of the table; DuckDB makes the JSON."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import IO

import pyarrow as pa
import pyarrow.compute as pc

from captioner.export.request import ExportFormat, Request, Shard
from captioner.query.output import finite
from captioner.query.views import quoted

__all__ = ["JSONL", "json_sql", "strict_json"]

_NOT_JSON = r"[:\[,](NaN|-?Infinity)[,\]}]"
_FLOATS = ("FLOAT", "DOUBLE")


def json_sql(request: Request, without: Sequence[str] = ()) -> str:
    """Return SQL of the exported columns of a row as one JSON object. Bytes are base64; NaN may be in nested values."""
    chosen = {name: sql for name, sql in request.selected().items() if name not in without}
    values = {name: _plain(sql, request.kinds.get(name, "")) for name, sql in chosen.items()}
    members = ", ".join(f"{quoted(name)}: {value}" for name, value in values.items())
    return f"to_json({{{members}}})::VARCHAR"


def _plain(value: str, kind: str) -> str:
    if kind in _FLOATS:
        return f"CASE WHEN isfinite({value}) THEN {value} END"
    return f"base64({value})" if kind == "BLOB" else value


def _columns(request: Request) -> Mapping[str, str]:
    return {"line": json_sql(request)}


def _write(shard: Shard) -> None:
    def write(file: IO[bytes]) -> None:
        for batch in shard.rows:
            file.write(_lines(batch.column("line")))

    shard.publish(JSONL.file_of(shard.number), write)


def _lines(lines: pa.Array) -> bytes:
    """Return the bytes of all lines; the few that hold what JSON has no number for, again without it."""
    if pc.any(pc.match_substring_regex(lines, _NOT_JSON)).as_py():
        return "".join(f"{strict_json(line)}\n" for line in lines.to_pylist()).encode()
    joined = pc.binary_join_element_wise(lines, "", "\n").cast(pa.binary())
    return memoryview(joined.buffers()[2])[_span(joined)].tobytes() if len(joined) else b""


def strict_json(line: str) -> str:
    """Return what `json_sql` made, with null for what JSON has no number for."""
    if re.search(_NOT_JSON, line) is None:
        return line
    return json.dumps(finite(json.loads(line)), ensure_ascii=False, separators=(",", ":"))


def _span(texts: pa.Array) -> slice:
    """Return where the bytes of all texts lie in their buffer, one behind the other."""
    offsets = memoryview(texts.buffers()[1]).cast("i")
    return slice(offsets[texts.offset], offsets[texts.offset + len(texts)])


JSONL = ExportFormat(
    name="jsonl",
    help="a JSON object a line, with --columns",
    columns=_columns,
    write=_write,
    file="captions-{:05d}.jsonl",
    has_columns=True,
    has_several=True,
)
