"""Tables of `source_schema` made from the rows of a unit, limited in rows and in bytes.

Knows the schema and the two limits; knows no store and no file format.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from captioner.schema import Reject, RejectReason, row_key, source_schema

__all__ = [
    "MAX_BLOCK_BYTES",
    "Done",
    "Limits",
    "Row",
    "positions_left",
    "rebatch",
    "source_table",
    "tables_of",
    "too_large",
]

MAX_BLOCK_BYTES = 32 << 20

Done = npt.NDArray[np.bool_]
"""bool[N], true where position `Limits.start_at` + n is done; positions past its end are not done."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much of a unit is read, and how much at once."""

    rows_per_block: int = 512
    """Most rows of one table."""

    max_image_bytes: int = 64 << 20
    """A larger image becomes a `too_large` row and is not kept in memory."""

    start_at: int = 0
    """Position in the unit from which to read."""

    stop_at: int | None = None
    """Position in the unit before which to stop."""

    def is_wanted(self, position: int, done: Done | None) -> bool:
        """Return whether a position is to be read, as far as `start_at` says and `done`."""
        index = position - self.start_at
        return index >= 0 and (done is None or index >= len(done) or not done[index])


class Row(NamedTuple):
    """One image as it was read: exactly one of `uri`, `data` and `reject` is set."""

    position: int
    image_id: str
    uri: str | None = None
    data: bytes | None = None
    reject: Reject | None = None
    kept: tuple[str | None, ...] = ()


def too_large(size_bytes: int, max_bytes: int) -> Reject | None:
    """Return the reject of an image with more than `max_bytes`, else None."""
    if size_bytes <= max_bytes:
        return None
    return Reject(RejectReason.TOO_LARGE, f"{size_bytes:,} bytes; --max-image-bytes is {max_bytes:,}")


def positions_left(num_rows: int, done: Done | None, limits: Limits) -> npt.NDArray[np.int64]:
    """Return the positions below `num_rows`, and within the limits, that are not done."""
    stop = num_rows if limits.stop_at is None else min(num_rows, limits.stop_at)
    positions: npt.NDArray[np.int64] = np.arange(limits.start_at, stop)
    if done is None:
        return positions
    known = done[: len(positions)]
    left: npt.NDArray[np.int64] = positions[~np.pad(known, (0, len(positions) - len(known)))]
    return left


def source_table(ordinal: int, columns: dict[str, object], kept: Sequence[pa.Field]) -> pa.Table:
    """Return a table of `source_schema(kept)`; columns not given are null, `position` becomes the key."""
    schema = source_schema(kept)
    positions = np.asarray(columns.pop("position"), dtype=np.int64)
    given = {
        "key": row_key(ordinal, 0) + positions,
        "attempt": np.ones(len(positions), dtype=np.int32),
        **columns,
    }
    return pa.table(
        [_array(given.get(field.name), field.type, len(positions)) for field in schema],
        schema=schema,
    )


def _array(values: object, kind: pa.DataType, length: int) -> pa.Array:
    if values is None:
        return pa.nulls(length, kind)
    return values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values, kind)


def tables_of(rows: Iterable[Row], ordinal: int, kept: Sequence[pa.Field], rows_per_block: int) -> Iterator[pa.Table]:
    """Yield the rows as tables, each as soon as it reaches a limit."""
    held: list[Row] = []
    held_bytes = 0
    for row in rows:
        size_bytes = len(row.data or b"") + len(row.image_id) + sum(len(text) for text in row.kept if text)
        if held and (len(held) == rows_per_block or held_bytes + size_bytes > MAX_BLOCK_BYTES):
            yield _table(held, ordinal, kept)
            held, held_bytes = [], 0
        held.append(row)
        held_bytes += size_bytes
    if held:
        yield _table(held, ordinal, kept)


def _table(rows: Sequence[Row], ordinal: int, kept: Sequence[pa.Field]) -> pa.Table:
    columns: dict[str, object] = {
        "position": [row.position for row in rows],
        "image_id": [row.image_id for row in rows],
        "uri": [row.uri for row in rows],
        "data": [row.data for row in rows],
        "reason": [row.reject and str(row.reject.reason) for row in rows],
        "detail": [row.reject and row.reject.detail for row in rows],
    }
    for index, field in enumerate(kept):
        columns[field.name] = [row.kept[index] if row.kept else None for row in rows]
    return source_table(ordinal, columns, kept)


def rebatch(tables: Iterable[pa.Table], rows_per_block: int) -> Iterator[pa.Table]:
    """Yield the same rows in tables of at most `rows_per_block` rows and MAX_BLOCK_BYTES (or one larger row)."""
    held: list[pa.Table] = []
    num_rows = num_bytes = 0
    for table in _split(tables, rows_per_block):
        if held and (num_rows + table.num_rows > rows_per_block or num_bytes + table.nbytes > MAX_BLOCK_BYTES):
            yield pa.concat_tables(held).combine_chunks()
            held, num_rows, num_bytes = [], 0, 0
        held.append(table)
        num_rows += table.num_rows
        num_bytes += table.nbytes
    if held:
        yield pa.concat_tables(held).combine_chunks()


def _split(tables: Iterable[pa.Table], rows_per_block: int) -> Iterator[pa.Table]:
    for table in tables:
        if table.num_rows > rows_per_block or (table.nbytes > MAX_BLOCK_BYTES and table.num_rows > 1):
            half = -(-table.num_rows // 2)
            yield from _split([table.slice(0, half), table.slice(half)], rows_per_block)
        elif table.num_rows:
            yield table
