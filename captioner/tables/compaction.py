"""Few large parts, sorted by key, in place of many small ones.

The new parts are made below `_run/compact-RUN/`, read back to the last byte, and only then put in the others' place:

- on a Linux file system the two folders are exchanged at one moment. Whoever lists `captions/` sees the old parts or
  the new ones; who listed the old ones and opens them later finds them gone, and never a row twice;
- on object stores, and where folders cannot be exchanged, the new parts are copied to their place and the old ones
  removed afterwards. Whoever lists in between sees rows twice, and never one too few.

A crash before the exchange leaves the old table and a folder that nobody reads; one after it the new table and the old
parts in that folder; one between copying and removing leaves rows in two parts, which the next run, or
`verify --repair`, mends to the same end (`mending`). Asks for no lease.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from captioner.errors import JobError
from captioner.sources.urls import join, name, redact
from captioner.tables.parts import Stamp, is_intact, read_ahead
from captioner.tables.table import FOLDERS, CaptionTable, columns_schema

__all__ = ["STAGING", "compact"]

STAGING = "compact-"
_TARGET_BYTES = 64 << 20  # of a part: some hundred thousand rows, which still fit in memory a few times
_THREADS = 16
_READERS = 4  # old parts that are held at the same time, beside the new one
_ORDER = {"captions": ["key"], "failures": ["key", "attempt"]}


@dataclass(frozen=True)
class _Layout:
    """Where each row of a folder is, and where it goes."""

    parts: list[str]
    row_part: np.ndarray
    """int32[N]: the part of each row, in the new order."""

    row_index: np.ndarray
    """int64[N]: its place in that part."""

    chunks: list[slice]
    """The rows of each new part."""

    is_sorted: bool
    """True if no two parts overlap."""

    @property
    def is_compact(self) -> bool:
        """True if new parts would be neither fewer nor in better order."""
        return self.is_sorted and len(self.parts) <= len(self.chunks)


def compact(table: CaptionTable, run_id: str, target_bytes: int = _TARGET_BYTES) -> dict[str, tuple[int, int]]:
    """Make the parts of each folder few, large and sorted by key; return their number before and after.

    The table's parts are whole and no row stands in two; `run_id` holds the lease and is recorded in the table.
    """
    stamp = Stamp(run_id, table.digest, is_leased=True)
    return {folder: _compact(table, folder, stamp, target_bytes) for folder in FOLDERS}


def _compact(table: CaptionTable, folder: str, stamp: Stamp, target_bytes: int) -> tuple[int, int]:
    layout = _layout(table, folder, target_bytes)
    if layout.is_compact:
        return len(layout.parts), len(layout.parts)
    staging = join("_run", STAGING + stamp.run_id, folder)
    staged = [_write(table, staging, layout, chunk, stamp, _ORDER[folder]) for chunk in layout.chunks]
    if table.store.exchange(join(table.url, folder), join(table.url, staging)):
        _clear(table, folder, staging, layout.parts)
    else:
        _replace(table, folder, staged, layout.parts)
    return len(layout.parts), len(staged)


def _layout(table: CaptionTable, folder: str, target_bytes: int) -> _Layout:
    parts, columns = table.parts(folder), _ORDER[folder]
    found = [_whole(part, url) for url, part in read_ahead(lambda url: table.read(url, columns), parts)]
    counts = [keys.num_rows for keys in found]
    rows = pa.concat_tables([columns_schema(columns).empty_table(), *found])
    order = np.lexsort([rows.column(column).to_numpy() for column in reversed(columns)])
    row_part = np.repeat(np.arange(len(parts), dtype=np.int32), counts)[order]
    size_bytes = sum(entry.size_bytes or 0 for entry in table.store.entries(join(table.url, folder)))
    rows_per_part = max(1, target_bytes * len(order) // max(1, size_bytes))
    return _Layout(
        parts=parts,
        row_part=row_part,
        row_index=order - np.cumsum([0, *counts])[row_part],
        chunks=list(_chunks(rows.column("key").to_numpy()[order], rows_per_part)),
        is_sorted=int((row_part[1:] != row_part[:-1]).sum()) < max(1, len(parts)),
    )


def _chunks(keys: np.ndarray, num_rows: int) -> Iterator[slice]:
    """Yield some `num_rows` of sorted keys at a time, equal ones together: a part is named by its keys."""
    ends = np.append(np.flatnonzero(keys[1:] != keys[:-1]) + 1, len(keys))
    start = 0
    while start < len(keys):
        end = int(ends[np.searchsorted(ends, min(start + num_rows, len(keys)))])
        yield slice(start, end)
        start = end


def _whole(part: pa.Table | None, url: str) -> pa.Table:
    if part is None:
        raise JobError(f"{redact(url)} can no longer be read; run jobs/verify.py again")
    return part.replace_schema_metadata()


def _write(
    table: CaptionTable, folder: str, layout: _Layout, chunk: slice, stamp: Stamp, columns: Sequence[str]
) -> str:
    """Write one new part, read it back, and return its URL."""
    row_part, row_index = layout.row_part[chunk], layout.row_index[chunk]

    def rows_of(part: int) -> pa.Table:
        with pq.ParquetFile(table.store.open(layout.parts[part])) as file:
            rows = file.read(use_threads=False).replace_schema_metadata()
        return rows.take(pa.array(np.sort(row_index[row_part == part])))

    pieces = [rows for _, rows in read_ahead(rows_of, np.unique(row_part).tolist(), _READERS)]
    rows = pa.concat_tables(pieces).sort_by([(column, "ascending") for column in columns])
    url = table.write_part(folder, rows, stamp)
    if not is_intact(table.store.read_bytes(url)):
        raise JobError(f"{redact(url)} cannot be read back as it was written; the table is as it was")
    return url


def _clear(table: CaptionTable, folder: str, staging: str, old: Sequence[str]) -> None:
    """Remove the old parts from where the exchange put them; whatever else stood beside them goes back."""
    compacted = {name(url) for url in old}
    for found in table.store.names(join(table.url, staging)):
        if found not in compacted:
            table.store.move(join(table.url, staging, found), join(table.url, folder, found))
    _for_each(lambda url: table.store.remove(join(table.url, staging, name(url))), old)


def _replace(table: CaptionTable, folder: str, staged: Sequence[str], old: Sequence[str]) -> None:
    _for_each(lambda url: table.store.move(url, join(table.url, folder, name(url))), staged)
    _for_each(table.store.remove, old)


def _for_each(change: Callable[[str], None], urls: Sequence[str]) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(change, urls))
