"""Which rows of a table are new, and their columns in the order of the input: flat memory for a table of any size.

A row is known by its key. The keys of an export are found once, by one query over the table with --where; then the rows
come in windows of keys, each sorted by itself, so that parts may lie in any order. Knows SQL, and no files of OUT.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from captioner.errors import JobError
from captioner.export.request import ExportFormat, Refusal, Request
from captioner.prompts import details_name
from captioner.query.views import Connection, quoted, select, stream
from captioner.tables.keys import KeySet

__all__ = ["NewRows", "columns_of", "cut", "find_new", "read_rows", "selection_sql"]

_WINDOW_ROWS = 131_072  # some 50 MB of captions are sorted at once
_BATCH_ROWS = 16_384
_KEY = "key"


def columns_of(connection: Connection) -> dict[str, str]:
    """Return the columns of `captions` and their types in SQL."""
    return {name: kind for name, kind, *_ in connection.execute("DESCRIBE captions").fetchall()}


def selection_sql(request: Request) -> str:
    """Return the SELECT of the rows that --where chooses: key, run, whether there is a text, bytes of the image.

    `no_mood` of an added prompt `mood`: whether it has no answer yet."""
    where = f"WHERE ({request.config.where}\n)" if request.config.where.strip() else ""
    added = "".join(f", {quoted(details_name(prompt))} IS NULL AS no_{prompt}" for prompt in request.added)
    return f"SELECT key, run_id, {request.text} <> '' AS has_text, size_bytes{added} FROM captions {where}"


@dataclass
class NewRows:
    """The rows that no earlier export has, sorted by key."""

    keys: np.ndarray
    size_bytes: np.ndarray
    """int64[N], of the image of each."""

    runs: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    num_selected: int = 0
    """Rows that --where chose, new or not."""

    unanswered: Counter[str] = field(default_factory=Counter)
    """Added prompt -> rows without an answer to it."""


def find_new(connection: Connection, request: Request, exported: KeySet) -> NewRows:
    """Return the rows of the selection that are not exported."""
    keys, sizes, runs = [np.empty(0, np.int64)], [np.empty(0, np.int64)], set[str]()
    refused, unanswered = Counter[str](), Counter[str]()
    num_selected = 0
    for batch in stream(connection, selection_sql(request), _WINDOW_ROWS):
        num_selected += batch.num_rows
        found = batch.column(_KEY).to_numpy()
        rows = batch.filter(pa.array(~exported.contains(found)))
        has_text = pc.fill_null(rows.column("has_text"), False)
        refused[Refusal.NO_TEXT] += rows.num_rows - (pc.sum(has_text).as_py() or 0)
        rows = rows.filter(has_text)
        keys.append(rows.column(_KEY).to_numpy())
        sizes.append(pc.fill_null(rows.column("size_bytes"), 0).to_numpy(zero_copy_only=False))
        unanswered.update({prompt: pc.sum(rows.column(f"no_{prompt}")).as_py() or 0 for prompt in request.added})
        runs.update(pc.unique(rows.column("run_id")).to_pylist())
    every, first = np.unique(np.concatenate(keys), return_index=True)  # a late writer's copy counts once
    return NewRows(every, np.concatenate(sizes)[first], sorted(runs), +refused, num_selected, +unanswered)


def cut(new: NewRows, first_shard: int, rows_per_file: int, bytes_per_file: int | None) -> np.ndarray:
    """Return int32[N], the shard of each row: none has more rows, or more bytes of images, unless one image has."""
    num_rows = len(new.keys)
    if bytes_per_file is None:
        return (first_shard + np.arange(num_rows) // rows_per_file).astype(np.int32)
    shards, ends = np.empty(num_rows, np.int32), np.cumsum(new.size_bytes)
    start = shard = 0
    while start < num_rows:
        before = ends[start - 1] if start else 0
        stop = int(np.searchsorted(ends, before + bytes_per_file, side="right"))
        stop = min(max(stop, start + 1), start + rows_per_file, num_rows)
        shards[start:stop] = first_shard + shard
        start, shard = stop, shard + 1
    return shards


def read_rows(
    connection: Connection, request: Request, form: ExportFormat, keys: np.ndarray
) -> Iterator[pa.RecordBatch]:
    """Yield `key` and the format's columns of the rows of these sorted keys, in their order.

    Raises JobError where the table has them no more."""
    wanted = form.columns(request)
    for start in range(0, len(keys), _WINDOW_ROWS):
        window = keys[start : start + _WINDOW_ROWS]
        num_rows = 0
        for batch in _window(connection, wanted, window):
            num_rows += batch.num_rows
            yield batch
        if num_rows != len(window):
            raise JobError(
                f"{len(window) - num_rows:,} rows that this export began with are no more in the table; expected a"
                " table that only grows: see jobs/verify.py, and export it into a new OUT"
            )


def _window(connection: Connection, columns: Mapping[str, str], keys: np.ndarray) -> Iterator[pa.RecordBatch]:
    chosen = ", ".join([_KEY, *(f"{sql} AS {quoted(name)}" for name, sql in columns.items() if name != _KEY)])
    sql = f"SELECT {chosen} FROM captions WHERE key BETWEEN {keys[0]} AND {keys[-1]} ORDER BY key"
    last = -1
    for batch in select(connection, sql).to_arrow_reader(_BATCH_ROWS):
        found = batch.column(0).to_numpy()
        is_first = np.diff(found, prepend=last) != 0
        last = int(found[-1]) if len(found) else last
        is_wanted = is_first & (keys[np.minimum(np.searchsorted(keys, found), len(keys) - 1)] == found)
        yield batch if is_wanted.all() else batch.filter(pa.array(is_wanted))
