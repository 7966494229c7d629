"""Rows on their way out of a unit: tables of `rows.source_schema`, neither too long nor too heavy.

Knows the schema and the two limits; knows no store and no file format.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from captioner.rows import Reject, RejectReason, row_key, source_schema

__all__ = [
    "MAX_BLOCK_BYTES",
    "Done",
    "Limits",
    "Row",
    "assemble",
    "positions_left",
    "regulate",
    "tabulate",
    "too_large",
]

MAX_BLOCK_BYTES = 32 << 20

Done = npt.NDArray[np.bool_]
"""bool[N], true where a position is done already; positions past its end are not."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much is read, and how much at once."""

    rows_per_block: int = 512
    """Rows of one table at most."""

    max_image_bytes: int = 64 << 20
    """A larger image is a `too_large` row, and is not held."""

    stop_at: int | None = None
    """Position in the unit before which to stop."""


class Row(NamedTuple):
    """One image as read: exactly one of `uri`, `data` and `reject` is set."""

    position: int
    image_id: str
    uri: str | None = None
    data: bytes | None = None
    reject: Reject | None = None
    kept: tuple[str | None, ...] = ()


def too_large(size_bytes: int, max_bytes: int) -> Reject | None:
    """Return the reject of an image that has more bytes than it may, else None."""
    if size_bytes <= max_bytes:
        return None
    return Reject(RejectReason.TOO_LARGE, f"{size_bytes:,} bytes; --max-image-bytes is {max_bytes:,}")


def positions_left(num_rows: int, done: Done | None, stop_at: int | None) -> npt.NDArray[np.int64]:
    """Return the positions below `num_rows`, and below `stop_at` if it is given, that are not done yet."""
    positions: npt.NDArray[np.int64] = np.arange(num_rows if stop_at is None else min(num_rows, stop_at))
    if done is None:
        return positions
    known = done[: len(positions)]
    left: npt.NDArray[np.int64] = positions[~np.pad(known, (0, len(positions) - len(known)))]
    return left


def assemble(ordinal: int, columns: dict[str, object], kept: Sequence[pa.Field]) -> pa.Table:
    """Return a table of `rows.source_schema(kept)`; columns that are not given are null, `position` becomes the key."""
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


def tabulate(rows: Iterable[Row], ordinal: int, kept: Sequence[pa.Field], rows_per_block: int) -> Iterator[pa.Table]:
    """Yield the rows as tables, each as soon as it is full or heavy."""
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
    return assemble(ordinal, columns, kept)


def regulate(tables: Iterable[pa.Table], rows_per_block: int) -> Iterator[pa.Table]:
    """Yield the same rows in tables of at most `rows_per_block` rows and MAX_BLOCK_BYTES (or one heavier row)."""
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
