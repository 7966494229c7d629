"""Few large parts, sorted by key, in place of many small ones.

The new parts are made below `_run/compact-RUN/`, read back to the last byte, and only then replace the old ones:

- on a Linux file system the two folders are exchanged atomically. A reader that lists `captions/` sees the old parts or
  the new ones; one that opens old parts later finds them gone, and never a row twice;
- on object stores, and where folders cannot be exchanged, the new parts are copied to their place and the old ones
  removed afterwards. A reader that lists in between sees rows twice, and never one too few.

A crash before the exchange leaves the old table and a folder that no one reads; one after it the new table and the old
parts in that folder; one between copying and removing leaves rows in two parts, which the next run, or
`verify --repair`, drops to the same end (`repair`). Takes no lease.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from captioner.errors import JobError
from captioner.storage import Location
from captioner.storage.parquet import open_parquet_file
from captioner.storage.urls import name, redact
from captioner.tables.layouts import concat_parts
from captioner.tables.parts import Stamp, is_intact, read_ahead, row_identity
from captioner.tables.row_set import RowId, RowSet, row_ids
from captioner.tables.table import CaptionTable

__all__ = ["STAGING", "compact"]

STAGING = "compact-"
_TARGET_BYTES = 64 << 20  # of a part: some hundred thousand rows, which still fit in memory a few times
_MAX_ROWS = 1 << 20  # of a part whose rows compress well: those in memory do not
_THREADS = 16
_END: RowId = (1 << 63, 0)  # behind every row
_READERS = 4  # old parts that are held at the same time, beside the new one


@dataclass(frozen=True)
class _Span:
    """An old part, and the rows between which all of its rows are."""

    url: str
    first: RowId
    last: RowId


@dataclass(frozen=True)
class _Layout:
    """Which old parts there are, and where the new ones begin."""

    parts: list[str]
    spans: list[_Span]
    """Of the parts that have rows."""

    starts: list[RowId]
    """The first row of each new part."""

    @property
    def is_compact(self) -> bool:
        """True if new parts would be neither fewer nor in better order."""
        spans = sorted(self.spans, key=lambda span: span.first)
        is_sorted = all(before.last < span.first for before, span in pairwise(spans))
        return is_sorted and len(self.parts) <= len(self.starts)


def compact(table: CaptionTable, run_id: str, target_bytes: int = _TARGET_BYTES) -> dict[str, tuple[int, int]]:
    """Make the parts of each folder few, large and sorted by key; return their number before and after.

    The table's parts are whole and no two hold the same row; `run_id` holds the lease and is recorded in the table.
    """
    return {
        folder: _compact(table, folder, Stamp(run_id, family.digest, is_leased=True), target_bytes)
        for family in table.families()
        for folder in family.folders
    }


def _compact(table: CaptionTable, folder: str, stamp: Stamp, target_bytes: int) -> tuple[int, int]:
    layout = _layout(table, folder, target_bytes)
    if layout.is_compact:
        return len(layout.parts), len(layout.parts)
    staging = table.run_folder / (STAGING + stamp.run_id)
    stops = [*layout.starts[1:], _END]
    staged = [
        _write(table, staging, folder, layout.spans, start, stop, stamp)
        for start, stop in zip(layout.starts, stops, strict=True)
    ]
    if table.store.exchange(table.location / folder, staging / folder):
        _clear(table, folder, staging / folder, layout.parts)
    else:
        _replace(table, folder, staged, layout.parts)
    return len(layout.parts), len(staged)


def _layout(table: CaptionTable, folder: str, target_bytes: int) -> _Layout:
    parts, rows, spans = table.parts(folder), RowSet(), []
    for url, part in read_ahead(lambda url: table.read(url, row_identity(folder)), parts):
        keys, attempts = row_ids(_whole(part, url))
        rows.add(keys, attempts)
        if len(keys):
            order = np.lexsort([attempts, keys])
            first, last = ((int(keys[place]), int(attempts[place])) for place in (order[0], order[-1]))
            spans.append(_Span(url, first, last))
    size_bytes = sum(entry.size_bytes or 0 for entry in table.store.entries(table.location / folder))
    rows_per_part = min(_MAX_ROWS, max(1, target_bytes * len(rows) // max(1, size_bytes)))
    return _Layout(parts, spans, list(rows.every(rows_per_part)))


def _whole(part: pa.Table | None, url: str) -> pa.Table:
    if part is None:
        raise JobError(f"{redact(url)} can no longer be read; run jobs/verify.py again")
    return part.replace_schema_metadata()


def _write(
    table: CaptionTable,
    staging: Location,
    folder: str,
    spans: Sequence[_Span],
    start: RowId,
    stop: RowId,
    stamp: Stamp,
) -> str:
    """Write the rows from `start` to before `stop` below `staging`, read them back, and return the part's URL."""

    def rows_of(url: str) -> pa.Table:
        with open_parquet_file(table.store.open(url)) as file:
            rows = file.read(use_threads=False).replace_schema_metadata()
        return rows.filter(pa.array(_is_between(rows, start, stop)))

    overlapping = [span.url for span in spans if span.first < stop and span.last >= start]
    pieces = [rows for _, rows in read_ahead(rows_of, overlapping, _READERS)]
    rows = concat_parts(pieces).sort_by([(column, "ascending") for column in row_identity(folder)])
    url = table.write_part(folder, rows, stamp, staging)
    if not is_intact(table.store.read_bytes(url)):
        raise JobError(f"{redact(url)} cannot be read back as it was written; the table is as it was")
    return url


def _is_between(rows: pa.Table, start: RowId, stop: RowId) -> np.ndarray:
    """Return bool[N], true for rows from `start` to before `stop`."""
    keys, attempts = row_ids(rows)
    is_from: np.ndarray = (keys > start[0]) | ((keys == start[0]) & (attempts >= start[1]))
    is_before: np.ndarray = (keys < stop[0]) | ((keys == stop[0]) & (attempts < stop[1]))
    is_between: np.ndarray = is_from & is_before
    return is_between


def _clear(table: CaptionTable, folder: str, staging: Location, old: Sequence[str]) -> None:
    """Remove the old parts from where the exchange put them; move whatever else was beside them back."""
    compacted = {name(url) for url in old}
    for found in table.store.names(staging):
        if found not in compacted:
            table.store.move(staging / found, table.location / folder / found)
    _for_each(lambda url: table.store.remove(staging / name(url)), old)


def _replace(table: CaptionTable, folder: str, staged: Sequence[str], old: Sequence[str]) -> None:
    _for_each(lambda url: table.store.move(url, table.location / folder / name(url)), staged)
    _for_each(table.store.remove, old)


def _for_each(change: Callable[[str], None], urls: Sequence[str]) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(change, urls))
