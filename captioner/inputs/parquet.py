"""Parquet files that hold images or their URIs: open one, and read its rows as a stream.

Reads only the needed columns, row group by row group, in pieces, and skips row groups without a wanted row. Knows one
file at a time.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from captioner.inputs.blocks import (
    MAX_BLOCK_BYTES,
    Done,
    Limits,
    Row,
    positions_left,
    source_table,
    tables_of,
    too_large,
)
from captioner.inputs.columns import holds_images, holds_uris, is_bytes, is_list, is_struct, is_text, plain_type
from captioner.inputs.crashes import count_crashes
from captioner.inputs.dictionaries import decoded
from captioner.inputs.image_lists import ITEM, ROW, each_image, first_images, num_images
from captioner.inputs.payloads import decode_payload, is_payload
from captioner.inputs.units import Columns, Unit
from captioner.schema import Reject, RejectReason
from captioner.storage import Store, urls
from captioner.storage.faults import Fault, StoreError, changed
from captioner.storage.parquet import ParquetFile, open_parquet_file
from captioner.storage.parquet_pages import Page, PageError, PageGuard

__all__ = ["open_parquet", "plain_batches", "read_parquet"]

_PIECE_BYTES = 4 << 20  # read at once from a column
_LIGHT_ROWS = 1 << 16  # read at once from a row group that is small as a whole: skipping rows is cheap then
_MAX_AT_ONCE = 1 << 28  # bytes of plain values in the rows that are read at once, as the headers of their pages say
_MAX_ITEMS = 1 << 26  # of a column of lists in one row group, beyond _ITEMS_PER_BYTE for each of its bytes
_ITEMS_PER_BYTE = 16
_MAX_CRASHES = 3
_DATA_ERRORS = (pa.ArrowException, OSError, UnicodeDecodeError)  # what Arrow raises for damaged bytes
_OPEN_ERRORS = (*_DATA_ERRORS, ValueError, TypeError, LookupError, ArithmeticError, RecursionError)
"""Also what Ray's extension types, registered in every process, raise for a schema made to break them."""

Positions = npt.NDArray[np.int64]


def open_parquet(
    store: Store, url: str, guard: PageGuard | None = None, *, as_dictionaries: bool = False
) -> tuple[ParquetFile, int]:
    """Return an open file, its footer read, and its size in bytes. Raises StoreError, `corrupt` for a bad footer.

    The options are those of `open_parquet_file`."""
    source = store.open_unbuffered(url)
    try:
        file = open_parquet_file(
            source, guard, as_dictionaries=as_dictionaries, buffer_size=_PIECE_BYTES, pre_buffer=False
        )
        return file, source.size_bytes
    except StoreError:
        raise
    except _OPEN_ERRORS as error:
        raise StoreError(Fault(RejectReason.CORRUPT, f"not a Parquet file: {error}"[:300])) from error


def plain_batches(
    file: pq.ParquetFile, num_rows: int, columns: list[str], row_groups: Sequence[int] | None = None
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a file that is open `as_dictionaries`, at most so many at once and 32 MiB of values.

    A batch ends with its row group: Arrow cannot join the dictionaries of two inside a struct."""
    for group in range(file.num_row_groups) if row_groups is None else row_groups:
        for batch in file.iter_batches(num_rows, row_groups=[group], columns=columns, use_threads=False):
            yield from decoded(batch, MAX_BLOCK_BYTES)


def read_parquet(
    store: Store, unit: Unit, columns: Columns, limits: Limits, done: Done | None = None
) -> Iterator[pa.Table]:
    """Yield the rows of one file that are not done; rejects in place of those that cannot be read.

    A bad row group costs its own rows, a store that fails costs all rows that follow, and a file that changed since it
    was frozen costs all rows that are left.
    """
    assert unit.num_rows is not None
    left = positions_left(unit.num_rows, done, limits)
    guard = PageGuard()
    try:
        file = _open_unchanged(store, unit, columns, guard)
    except StoreError as error:
        yield from _rejects(error.fault.reject_of_unit, left, unit, columns, limits)
        return
    with file:
        if columns.image not in file.schema_arrow.names:
            yield from _rejects(Reject(RejectReason.CORRUPT, f"no column {columns.image}"), left, unit, columns, limits)
            return
        if not holds_images(kind := file.schema_arrow.field(columns.image).type):
            reject = Reject(RejectReason.UNSUPPORTED, f"column {columns.image} is {kind}"[:300])
            yield from _rejects(reject, left, unit, columns, limits)
            return
        yield from _Reader(file, guard, unit, columns, limits).rows(left)


def _open_unchanged(store: Store, unit: Unit, columns: Columns, guard: PageGuard) -> ParquetFile:
    file, size_bytes = open_parquet(store, unit.path, guard, as_dictionaries=True)
    has_items = size_bytes == unit.size_bytes and _has_items(file, columns)
    groups = range(file.num_row_groups) if has_items else ()
    num_rows = sum(num_images(file, str(columns.image), group) for group in groups) or file.metadata.num_rows
    if (num_rows, size_bytes) == (unit.num_rows, unit.size_bytes):
        return file
    file.close()
    now, then = f"{num_rows} rows and {size_bytes} bytes", f"{unit.num_rows} and {unit.size_bytes}"
    raise StoreError(changed(f"it has {now}, not {then}"))


def _has_items(file: ParquetFile, columns: Columns) -> bool:
    """Return whether the rows of a unit are the items of lists."""
    schema = file.schema_arrow
    is_there = columns.has_each_item and columns.image in schema.names
    return is_there and is_list(schema.field(columns.image).type)


def _rejects(reject: Reject, positions: Positions, unit: Unit, columns: Columns, limits: Limits) -> Iterator[pa.Table]:
    rows = (Row(int(position), f"{unit.name}#{position}", reject=reject) for position in positions)
    return tables_of(rows, unit.ordinal, columns.kept, limits.rows_per_block)


class _CrashingError(Exception):
    """Reading crashed too many processes."""


class _HeavyError(Exception):
    """The rows of a batch would be too many bytes. num_rows: how many to read at once instead."""

    def __init__(self, num_rows: int) -> None:
        super().__init__(num_rows)
        self.num_rows = num_rows


class _Watch:
    """Looks at the pages of a row group: at most `num_rows` of its rows are held at once."""

    def __init__(self, num_rows: int, *, has_lists: bool) -> None:
        self._num_rows = num_rows
        self._has_lists = has_lists
        self._num_items_left = _MAX_ITEMS

    def check(self, page: Page) -> None:
        """Raise _HeavyError where so many rows as large as those of this page are too much, PageError for a list."""
        row_bytes = page.size_bytes / max(1, page.num_values)
        if self._num_rows > 1 and self._num_rows * row_bytes > _MAX_AT_ONCE:
            raise _HeavyError(max(1, min(self._num_rows // 2, int(_MAX_AT_ONCE / 2 / row_bytes))))
        if self._has_lists:
            self._num_items_left -= page.num_values - _ITEMS_PER_BYTE * page.compressed_bytes
            if self._num_items_left < 0:
                raise PageError(f"lists of {page.num_values:,} items in a page of {page.compressed_bytes:,} bytes")


class _Reader:
    def __init__(self, file: ParquetFile, guard: PageGuard, unit: Unit, columns: Columns, limits: Limits) -> None:
        self._file = file
        self._guard = guard
        self._unit = unit
        self._columns = columns
        self._limits = limits
        self._folder = urls.parent(unit.path)
        self._has_items = _has_items(file, columns)
        self._next = 0  # the first position that no table has covered yet

    def rows(self, left: Positions) -> Iterator[pa.Table]:
        first = 0
        for group in range(self._file.num_row_groups):
            stop = first + self._num_rows(group)
            wanted = left[slice(*np.searchsorted(left, [first, stop]))]
            reject = Reject(RejectReason.CORRUPT, f"row group {group} ends too early")
            try:
                yield from self._group(group, first, wanted)
            except StoreError as error:
                yield from self._reject(error.fault.reject_of_unit, left)
                return
            except _CrashingError as error:  # perhaps not corrupt: the machine may have run out of memory
                reject = Reject(RejectReason.OUT_OF_MEMORY, f"row group {group}: {error}")
            except _DATA_ERRORS as error:
                reject = Reject(RejectReason.CORRUPT, f"row group {group}: {error}"[:300])
            yield from self._reject(reject, wanted)
            first = stop
        yield from self._reject(Reject(RejectReason.CORRUPT, "in no row group"), left[left >= first])

    def _num_rows(self, group: int) -> int:
        if self._has_items:
            return num_images(self._file, str(self._columns.image), group)
        return int(self._file.metadata.row_group(group).num_rows)

    def _reject(self, reject: Reject, positions: Positions) -> Iterator[pa.Table]:
        return _rejects(reject, positions[positions >= self._next], self._unit, self._columns, self._limits)

    def _group(self, group: int, first: int, wanted: Positions) -> Iterator[pa.Table]:
        if not len(wanted):
            return
        present = set(self._file.schema_arrow.names)
        wished = (self._columns.image, self._columns.id, *self._columns.kept_from)
        names = [name for name in wished if name and name in present]
        self._next = first
        for batch in self._pieces(group, names):
            stop = self._next + batch.num_rows
            positions = wanted[slice(*np.searchsorted(wanted, [self._next, stop]))]
            batch = batch.cast(pa.schema([field.with_type(_without_view(field.type)) for field in batch.schema]))
            taken = batch if len(positions) == batch.num_rows else batch.take(pa.array(positions - self._next))
            if len(positions):
                yield self._table(taken, positions)
            self._next = stop
            if stop > wanted[-1]:
                return  # one wanted row does not wait for the rest of its group

    def _pieces(self, group: int, names: list[str]) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a group, in bounded pieces: of lists their first images, or each image as a row."""
        image = str(self._columns.image)
        first_row = sum(self._file.metadata.row_group(before).num_rows for before in range(group))
        for batch in self._batches(group, names):
            num_read = batch.num_rows
            if self._has_items:
                batch = each_image(batch, image, first_row)
            elif is_list(batch.schema.field(image).type):
                batch = first_images(batch, image)
            yield from decoded(batch, MAX_BLOCK_BYTES)
            first_row += num_read

    def _batches(self, group: int, names: list[str]) -> Iterator[pa.RecordBatch]:
        """Yield what Arrow reads, in smaller batches from where a page has larger values than its footer says.

        Raises _CrashingError for rows that crashed the processes that tried before."""
        num_read, num_rows = 0, self._batch_size(group, names)
        while True:
            watch = _Watch(num_rows, has_lists=any(map(_is_repeated, self._types(names))))
            self._guard.on_page = watch.check
            self._guard.restart()
            try:
                for batch in self._of_size(group, names, num_rows, num_skipped=num_read):
                    yield batch
                    num_read += batch.num_rows
                return
            except _HeavyError as error:
                num_rows = error.num_rows

    def _of_size(self, group: int, names: list[str], num_rows: int, num_skipped: int) -> Iterator[pa.RecordBatch]:
        batches: Iterator[pa.RecordBatch] | None = None
        while True:
            with count_crashes(f"{self._unit.path} {self._unit.size_bytes} row {self._next} of {names}") as num_crashes:
                if num_crashes >= _MAX_CRASHES:
                    raise _CrashingError(f"reading row {self._next} ended {num_crashes} processes")
                batches = batches or self._file.iter_batches(
                    batch_size=num_rows, row_groups=[group], columns=names, use_threads=False
                )
                batch = next(batches, None)
            if batch is None:
                return
            start, num_skipped = min(num_skipped, batch.num_rows), max(0, num_skipped - batch.num_rows)
            if start < batch.num_rows:
                yield batch.slice(start)

    def _batch_size(self, group: int, names: list[str]) -> int:
        """Return how many rows make a block on average: rows of one file have similar sizes.

        Columns that are not read count too: asking Arrow 26 about a single damaged one crashes the process.
        """
        metadata = self._file.metadata.row_group(group)
        rows: int = MAX_BLOCK_BYTES * metadata.num_rows // max(1, metadata.total_byte_size)
        is_light = metadata.total_byte_size <= MAX_BLOCK_BYTES
        width = sum(map(_width, self._types(names)))  # which a dictionary holds once for all rows
        return max(1, min(rows, _LIGHT_ROWS if is_light else self._limits.rows_per_block, MAX_BLOCK_BYTES // width))

    def _types(self, names: list[str]) -> list[pa.DataType]:
        return [self._file.schema_arrow.field(name).type for name in names]

    def _table(self, batch: pa.RecordBatch, positions: Positions) -> pa.Table:
        values = {name: _plain(batch.column(name)) for name in batch.schema.names}
        image = values[self._columns.image]
        if is_bytes(image.type) and holds_uris(str(self._columns.image), image.type):
            image = _plain(image.cast(pa.binary()).view(pa.string()))
        data, uris = _images(image)
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
        return source_table(self._unit.ordinal, named | kept, self._columns.kept)

    def _judge(self, size_bytes: int | None, uri: str | None) -> Reject | None:
        """Return why a row has no image, or None. size_bytes: of its bytes, None for a null."""
        if size_bytes is None:
            return None if uri else Reject(RejectReason.EMPTY, f"null in column {self._columns.image}")
        if size_bytes == 0:
            return Reject(RejectReason.EMPTY, "0 bytes")
        return too_large(size_bytes, self._limits.max_image_bytes)

    def _ids(self, values: dict[str, pa.Array], positions: Positions, uris: Sequence[str | None]) -> list[str]:
        """Return the id column; where it is null, the URI as written; where that is null too, file#row.

        Where each image of a list is a row, its place in the list ends the id and file#row, as in 4711-0."""
        given: list[str | None] = [None] * len(positions)
        if self._columns.id in values:
            given = _texts(values[self._columns.id])
        rows = values[ROW].to_pylist() if self._has_items else positions
        ends = [f"-{item}" for item in values[ITEM].to_pylist()] if self._has_items else [""] * len(positions)
        return [
            name + end if name is not None else urls.shown(uri) if uri else f"{self._unit.name}#{row}{end}"
            for name, uri, row, end in zip(given, uris, rows, ends, strict=True)
        ]


def _texts(values: pa.Array) -> list[str | None]:
    """Return ids as texts. Whole floats as integers: pandas has made them of integers where some are null."""
    texts: list[str | None] = values.cast(pa.string()).to_pylist()
    if not pa.types.is_floating(values.type):
        return texts
    numbers = values.to_pylist()
    return [
        None if number is None or math.isnan(number) else f"{number:.0f}" if number.is_integer() else text
        for number, text in zip(numbers, texts, strict=True)
    ]


def _is_repeated(kind: pa.DataType) -> bool:
    return bool(pa.types.is_nested(kind)) and (
        not pa.types.is_struct(kind) or any(_is_repeated(child.type) for child in kind)
    )


def _width(kind: pa.DataType) -> int:
    """Return the bytes that each value takes; 8 for one whose size differs."""
    if pa.types.is_struct(kind):
        return sum(_width(child.type) for child in kind) or 1
    return int(kind.byte_width) if pa.types.is_fixed_size_binary(kind) else 8


def _without_view(kind: pa.DataType) -> pa.DataType:
    return plain_type(kind) if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind) else kind


def _plain(values: pa.Array) -> pa.Array:
    """Return the values without dictionaries and extension types, text as UTF-8. Raises ArrowInvalid for bad values."""
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
    """Return the bytes as large_binary, null where there are none, and the URIs or paths. A text may be base64."""
    if is_bytes(values.type):
        return values.cast(pa.binary()).cast(pa.large_binary()), [None] * len(values)
    if not is_struct(values.type):
        texts = values.to_pylist()
        data = [decode_payload(text) if text and is_payload(text) else None for text in texts]
        return pa.array(data, pa.large_binary()), [
            text if one is None else None for text, one in zip(texts, data, strict=True)
        ]
    has_path = values.type.get_field_index("path") >= 0
    paths = pc.struct_field(values, "path").to_pylist() if has_path else [None] * len(values)
    return pc.struct_field(values, "bytes").cast(pa.large_binary()), paths


def _lengths(data: pa.Array) -> list[int | None]:
    return list(pc.binary_length(data).to_pylist())
