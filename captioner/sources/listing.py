"""The frozen listing: image files and lists of URIs, as Parquet parts of ROWS_PER_LISTING rows below `_run/listing/`.

One part is one unit. Never holds more than one part. Knows no other kind of input.
"""

import csv
import functools
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from captioner.config import InputConfig
from captioner.errors import InputError
from captioner.rows import RejectReason
from captioner.sources import columns, urls
from captioner.sources.blocks import Done, Limits, assemble, positions_left
from captioner.sources.faults import output_errors
from captioner.sources.store import Store, open_store
from captioner.sources.units import Columns, Frozen, Unit

__all__ = ["ROWS_PER_LISTING", "ListingWriter", "listed_ids", "read_listing", "write_uri_list"]

ROWS_PER_LISTING = 10_000
_ROWS_PER_GROUP = 256  # what one read task reads of a part; it decodes no others
_KEPT_UNITS = 32  # a megabyte each

_FOLDER = "listing"
_PART = re.compile(r"part-\d+\.parquet")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


class ListingWriter:
    """Writes the listing part by part; whatever an interrupted writer left is removed first.

    first: ordinal of the first part; the parts of lower ones belong to a listing that is frozen, and stay.
    """

    def __init__(
        self,
        run_folder: str,
        output_options: Mapping[str, Any] | None,
        on_progress: Callable[[int], None],
        first: int = 0,
    ) -> None:
        self._first = first
        self._folder = urls.join(urls.absolute(run_folder), _FOLDER)
        self._store = open_store(run_folder, output_options)
        self._on_progress = on_progress
        self.kept: tuple[pa.Field, ...] = ()
        self.units: list[Unit] = []
        self._held: list[tuple[object, ...]] = []
        self.discard()

    @property
    def num_rows(self) -> int:
        """Rows added so far."""
        return sum(unit.num_rows or 0 for unit in self.units) + len(self._held)

    def add(
        self, uri: str, size_bytes: int | None = None, image_id: str | None = None, kept: Sequence[Any] = ()
    ) -> None:
        """Append one image; an empty URI is a row without one. Its id is its URI, as shown, unless another is given."""
        self._held.append((uri or None, image_id or urls.shown(uri), size_bytes, *kept))
        if len(self._held) == ROWS_PER_LISTING:
            self._flush()

    def close(self) -> tuple[Unit, ...]:
        """Write what is held and return the units."""
        if self._held:
            self._flush()
        return tuple(self.units)

    def discard(self) -> None:
        """Remove every part, also those of an earlier, interrupted writer."""
        self.units, self._held = [], []
        with output_errors(self._folder):
            for name in self._store.names(self._folder):
                if not _PART.fullmatch(name) or int(name[5:-8]) >= self._first:
                    self._store.remove(urls.join(self._folder, name))

    def _flush(self) -> None:
        ordinal = self._first + len(self.units)
        name = f"part-{ordinal:06d}.parquet"
        data = _parquet(self._held, self.kept)
        with output_errors(self._folder):
            self._store.write_atomic(urls.join(self._folder, name), data)
        path = urls.join(_FOLDER, name)
        self.units.append(
            Unit(ordinal=ordinal, kind="listing", path=path, name=path, num_rows=len(self._held), size_bytes=len(data))
        )
        self._held = []
        self._on_progress(self.num_rows)


def _parquet(rows: Sequence[tuple[object, ...]], kept: Sequence[pa.Field]) -> bytes:
    named = [pa.field("uri", pa.string()), pa.field("image_id", pa.string()), pa.field("size_bytes", pa.int64()), *kept]
    values = zip(*rows, strict=True)
    table = pa.table(
        [pa.array(value, field.type) for value, field in zip(values, named, strict=True)], pa.schema(named)
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", row_group_size=_ROWS_PER_GROUP)
    return buffer.getvalue()


def read_listing(
    store: Store, url: str, unit: Unit, kept: Sequence[pa.Field], limits: Limits, done: Done | None
) -> Iterator[pa.Table]:
    """Yield the rows of one part that are not done, as one table. Raises StoreError."""
    file = pq.ParquetFile(io.BytesIO(store.read_bytes(url)))
    positions = positions_left(file.metadata.num_rows, done, limits.stop_at)
    table = _take(file, positions, ["uri", "image_id", *(field.name for field in kept)])
    taken = {name: table[name] for name in table.column_names}
    is_empty = pc.is_null(table["uri"])
    reject = {
        "reason": pc.if_else(is_empty, str(RejectReason.EMPTY), pa.scalar(None, pa.string())),
        "detail": pc.if_else(is_empty, "the list has no URI here", pa.scalar(None, pa.string())),
    }
    yield assemble(unit.ordinal, {"position": positions, **taken, **reject}, kept)


def _take(file: pq.ParquetFile, positions: npt.NDArray[np.int64], names: Sequence[str]) -> pa.Table:
    """Return the rows at ascending positions, having read the row groups that hold them."""
    starts = np.cumsum([0, *(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))])
    groups = np.unique(np.searchsorted(starts, positions, side="right") - 1)
    table = file.read_row_groups(groups.tolist(), columns=list(names), use_threads=False)
    held = np.concatenate([np.empty(0, np.int64), *(np.arange(starts[group], starts[group + 1]) for group in groups)])
    return table.take(np.searchsorted(held, positions))


def listed_ids(
    frozen: Frozen, run_folder: str, output_options: Mapping[str, Any] | None
) -> Callable[[int], pa.ChunkedArray | None]:
    """Return what finds the image_ids of a unit by its ordinal: None for a unit that is no part of the listing.

    Keeps those of the last units it was asked for. Raises StoreError.
    """
    store = open_store(run_folder, output_options)
    paths = {unit.ordinal: unit.path for unit in frozen.units if unit.kind == "listing"}

    @functools.lru_cache(_KEPT_UNITS)
    def ids(ordinal: int) -> pa.ChunkedArray | None:
        if ordinal not in paths:
            return None
        data = store.read_bytes(urls.join(urls.absolute(run_folder), paths[ordinal]))
        return pq.read_table(io.BytesIO(data), columns=["image_id"], use_threads=False).column(0)

    return ids


def write_uri_list(store: Store, url: str, config: InputConfig, writer: ListingWriter) -> Columns:
    """Add every URI of a .txt, .csv or .tsv list to the listing; relative ones lie in the list's own folder.

    Text: one URI a line, blank lines left out. CSV: a header; an empty cell is a row without an image; all columns are
    strings. Raises InputError naming the line of a broken CSV, or the columns when the one with URIs is not there.
    """
    with io.TextIOWrapper(store.open(url), "utf-8-sig", errors="backslashreplace", newline="") as lines:
        if delimiter := _DELIMITERS.get(urls.suffix(url)):
            return _write_csv(csv.reader(lines, delimiter=delimiter, strict=True), url, config, writer)
        if config.kept or config.id_column or config.image_column:
            raise InputError(f"{urls.redact(url)} is a plain list; columns can only be taken from .csv or .parquet")
        for line in lines:
            if uri := line.strip():
                writer.add(urls.resolve(uri, urls.parent(url)))
    return Columns()


def _check_header(name: str, where: str) -> None:
    """Raise InputError when the first line is already an image: it would not be in the table."""
    if "://" in name or urls.suffix(name) in urls.IMAGE_SUFFIXES:
        raise InputError(
            f"{where} begins with {urls.redact(name)}, where a CSV has the names of its columns; add such a line, or"
            " call a plain list of URIs .txt"
        )


def _write_csv(reader: Any, url: str, config: InputConfig, writer: ListingWriter) -> Columns:
    where = urls.redact(url)
    try:
        header: list[str] = next(reader, [])
        chosen = columns.choose(pa.schema([pa.field(name, pa.string()) for name in header]), config, where)
        _check_header(str(chosen.image), where)
        writer.kept = chosen.kept
        image, *others = (header.index(str(name)) for name in (chosen.image, *chosen.kept_from))
        id_index = None if chosen.id is None else header.index(chosen.id)
        for row, cells in enumerate(cells for cells in reader if cells):
            padded = [*cells, *[""] * (len(header) - len(cells))]
            uri = padded[image].strip()
            writer.add(
                urls.resolve(uri, urls.parent(url)) if uri else "",
                image_id=(padded[id_index] if id_index is not None else "") or ("" if uri else f"{where}#{row}"),
                kept=[padded[index] for index in others],
            )
    except csv.Error as error:
        raise InputError(f"{where}, line {reader.line_num}: {error}; expected a CSV with a header") from error
    return chosen
