"""Parquet files with images in them, or with the URIs of images: what each holds, and its rows as a stream.

Only the needed columns are read, row group by row group, in pieces; row groups without a wanted row are not read at
all. Knows one file at a time.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from captioner.rows import Reject, RejectReason
from captioner.sources import urls
from captioner.sources.blocks import MAX_BLOCK_BYTES, Done, Limits, Row, assemble, positions_left, tabulate, too_large
from captioner.sources.columns import is_bytes, is_struct, is_text, plain_type
from captioner.sources.deaths import begun
from captioner.sources.faults import Fault, StoreError, changed
from captioner.sources.store import Store
from captioner.sources.units import Columns, Unit

__all__ = ["open_parquet", "read_parquet"]

_PIECE_BYTES = 4 << 20  # of a column that is asked for at once
_MOST_DEATHS = 3
_DATA_ERRORS = (pa.ArrowException, OSError, UnicodeDecodeError)  # what Arrow raises for bytes that are not as promised
_OPEN_ERRORS = (*_DATA_ERRORS, ValueError, TypeError, LookupError, ArithmeticError, RecursionError)
"""Beyond these, what the column types that Ray registers in every process raise for a schema made up to break them."""

Positions = npt.NDArray[np.int64]


def open_parquet(store: Store, url: str) -> tuple[pq.ParquetFile, int]:
    """Return an open file, its footer read, and its size in bytes. Raises StoreError; `corrupt` for a bad footer."""
    source = store.open_unbuffered(url)
    try:
        return pq.ParquetFile(source, buffer_size=_PIECE_BYTES, pre_buffer=False), source.size_bytes
    except StoreError:
        raise
    except _OPEN_ERRORS as error:
        raise StoreError(Fault(RejectReason.CORRUPT, f"not a Parquet file: {error}"[:300])) from error


def read_parquet(
    store: Store, unit: Unit, columns: Columns, limits: Limits, done: Done | None = None
) -> Iterator[pa.Table]:
    """Yield the rows of one file that are not done; where they cannot be read, rejects in their place.

    A bad row group costs its own rows; a store that stops delivering costs all that follow, and a file that is not the
    one that was frozen all that are left.
    """
    assert unit.num_rows is not None
    left = positions_left(unit.num_rows, done, limits.stop_at)
    try:
        file = _open_unchanged(store, unit)
    except StoreError as error:
        yield from _rejects(error.fault.reject_of_unit, left, unit, columns, limits)
        return
    with file:
        if columns.image not in file.schema_arrow.names:
            yield from _rejects(Reject(RejectReason.CORRUPT, f"no column {columns.image}"), left, unit, columns, limits)
            return
        yield from _Reader(file, unit, columns, limits).rows(left)


def _open_unchanged(store: Store, unit: Unit) -> pq.ParquetFile:
    file, size_bytes = open_parquet(store, unit.path)
    num_rows = file.metadata.num_rows
    if (num_rows, size_bytes) == (unit.num_rows, unit.size_bytes):
        return file
    file.close()
    now, then = f"{num_rows} rows and {size_bytes} bytes", f"{unit.num_rows} and {unit.size_bytes}"
    raise StoreError(changed(f"it has {now}, not {then}"))


def _rejects(reject: Reject, positions: Positions, unit: Unit, columns: Columns, limits: Limits) -> Iterator[pa.Table]:
    rows = (Row(int(position), f"{unit.name}#{position}", reject=reject) for position in positions)
    return tabulate(rows, unit.ordinal, columns.kept, limits.rows_per_block)


class _DeadlyError(Exception):
    """Reading ended too many processes."""


class _Reader:
    def __init__(self, file: pq.ParquetFile, unit: Unit, columns: Columns, limits: Limits) -> None:
        self._file = file
        self._unit = unit
        self._columns = columns
        self._limits = limits
        self._folder = urls.parent(unit.path)
        self._next = 0  # the first position that no table has covered yet

    def rows(self, left: Positions) -> Iterator[pa.Table]:
        first = 0
        for group in range(self._file.num_row_groups):
            stop = first + self._file.metadata.row_group(group).num_rows
            wanted = left[(left >= first) & (left < stop)]
            reject = Reject(RejectReason.CORRUPT, f"row group {group} ends too early")
            try:
                yield from self._group(group, first, wanted)
            except StoreError as error:
                yield from self._reject(error.fault.reject_of_unit, left)
                return
            except _DeadlyError as error:  # not corrupt for certain: the machine may have had no memory left
                reject = Reject(RejectReason.OUT_OF_MEMORY, f"row group {group}: {error}")
            except _DATA_ERRORS as error:
                reject = Reject(RejectReason.CORRUPT, f"row group {group}: {error}"[:300])
            yield from self._reject(reject, wanted)
            first = stop
        yield from self._reject(Reject(RejectReason.CORRUPT, "in no row group"), left[left >= first])

    def _reject(self, reject: Reject, positions: Positions) -> Iterator[pa.Table]:
        return _rejects(reject, positions[positions >= self._next], self._unit, self._columns, self._limits)

    def _group(self, group: int, first: int, wanted: Positions) -> Iterator[pa.Table]:
        if not len(wanted):
            return
        present = set(self._file.schema_arrow.names)
        wished = (self._columns.image, self._columns.id, *self._columns.kept_from)
        names = [name for name in wished if name and name in present]
        self._next = first
        for batch in self._batches(group, names):
            stop = self._next + batch.num_rows
            positions = wanted[(wanted >= self._next) & (wanted < stop)]
            batch = batch.cast(pa.schema([field.with_type(_without_view(field.type)) for field in batch.schema]))
            taken = batch if len(positions) == batch.num_rows else batch.take(pa.array(positions - self._next))
            if len(positions):
                yield self._table(taken, positions)
            self._next = stop
            if stop > wanted[-1]:
                return  # who wants one row does not wait for the rest of its group

    def _batches(self, group: int, names: list[str]) -> Iterator[pa.RecordBatch]:
        """Yield what Arrow reads. Raises _DeadlyError for what ended the processes that tried before."""
        batches: Iterator[pa.RecordBatch] | None = None
        while True:
            with begun(f"{self._unit.path} {self._unit.size_bytes} row {self._next} of {names}") as num_deaths:
                if num_deaths >= _MOST_DEATHS:
                    raise _DeadlyError(f"reading row {self._next} ended {num_deaths} processes")
                batches = batches or self._file.iter_batches(
                    batch_size=self._batch_size(group), row_groups=[group], columns=names, use_threads=False
                )
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _batch_size(self, group: int) -> int:
        """Return as many rows as make a block on average: those of one file are of like size.

        Columns that are not read count too: to ask Arrow 26 about a single one ends the process if it is damaged.
        """
        metadata = self._file.metadata.row_group(group)
        rows: int = MAX_BLOCK_BYTES * metadata.num_rows // max(1, metadata.total_byte_size)
        return max(1, min(rows, self._limits.rows_per_block))

    def _table(self, batch: pa.RecordBatch, positions: Positions) -> pa.Table:
        values = {name: _plain(batch.column(name)) for name in batch.schema.names}
        data, uris = _images(values[self._columns.image])
        resolved = [urls.resolve(uri, self._folder) if uri else None for uri in uris]
        rejects = [self._judge(size, uri) for size, uri in zip(_lengths(data), resolved, strict=True)]
        is_good = pa.array([reject is None for reject in rejects])
        ids = self._ids(values, positions, uris)
        kept = {
            field.name: values[name].cast(field.type, safe=False)
            for field, name in zip(self._columns.kept, self._columns.kept_from, strict=True)
            if name in values
        }
        named: dict[str, object] = {
            "position": positions,
            "image_id": ids,
            "uri": pc.if_else(pc.is_null(data), pa.array(resolved, pa.string()), None),
            "data": pc.if_else(is_good, data, None),
            "reason": [reject and str(reject.reason) for reject in rejects],
            "detail": [reject and reject.detail for reject in rejects],
        }
        return assemble(self._unit.ordinal, named | kept, self._columns.kept)

    def _judge(self, size_bytes: int | None, uri: str | None) -> Reject | None:
        """Return why a row has no image, if so, from the size of its bytes (None for a null) and its URI."""
        if size_bytes is None:
            return None if uri else Reject(RejectReason.EMPTY, f"null in column {self._columns.image}")
        if size_bytes == 0:
            return Reject(RejectReason.EMPTY, "0 bytes")
        return too_large(size_bytes, self._limits.max_image_bytes)

    def _ids(self, values: dict[str, pa.Array], positions: Positions, uris: Sequence[str | None]) -> list[str]:
        """Return the id column; where that is null, the URI as written; where that is null too, file#row."""
        given = [None] * len(positions)
        if self._columns.id in values:
            given = values[self._columns.id].cast(pa.string()).to_pylist()
        return [
            name if name is not None else urls.shown(uri) if uri else f"{self._unit.name}#{position}"
            for name, uri, position in zip(given, uris, positions, strict=True)
        ]


def _without_view(kind: pa.DataType) -> pa.DataType:
    return plain_type(kind) if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind) else kind


def _plain(values: pa.Array) -> pa.Array:
    """Return the values without dictionaries and extension types, text as UTF-8. Raises ArrowInvalid for nonsense."""
    values = values.storage if isinstance(values, pa.ExtensionArray) else values
    values = values.cast(plain_type(values.type)) if pa.types.is_dictionary(values.type) else values
    try:
        values.validate(full=True)
    except pa.ArrowInvalid:
        if not is_text(values.type):
            raise
        texts = [value and value.decode("utf-8", "backslashreplace") for value in values.cast(pa.binary()).to_pylist()]
        return pa.array(texts, values.type)
    return values


def _images(values: pa.Array) -> tuple[pa.Array, list[str | None]]:
    """Return the bytes as large_binary, null where there are none, and the URIs or paths beside them."""
    if is_bytes(values.type):
        return values.cast(pa.binary()).cast(pa.large_binary()), [None] * len(values)
    if not is_struct(values.type):
        return pa.nulls(len(values), pa.large_binary()), values.to_pylist()
    has_path = values.type.get_field_index("path") >= 0
    paths = pc.struct_field(values, "path").to_pylist() if has_path else [None] * len(values)
    return pc.struct_field(values, "bytes").cast(pa.large_binary()), paths


def _lengths(data: pa.Array) -> list[int | None]:
    return list(pc.binary_length(data).to_pylist())
