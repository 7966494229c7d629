"""The frozen listing: image files and lists of URIs, as Parquet parts of ROWS_PER_LISTING rows below `_run/listing/`.

One part is one unit. Memory holds one part at most. Knows no other kind of input.
"""

import functools
import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from captioner.inputs.blocks import Done, Limits, positions_left, source_table
from captioner.inputs.units import Frozen, Unit
from captioner.schema import RejectReason
from captioner.storage import Place, Store, as_location, open_store, urls
from captioner.storage.faults import output_errors
from captioner.storage.parquet import open_parquet_file

__all__ = ["ROWS_PER_LISTING", "ListingWriter", "listed_ids", "listed_uri", "read_listing"]

ROWS_PER_LISTING = 10_000
_ROWS_PER_GROUP = 256  # one read task decodes a group and no others
_KEPT_UNITS = 32  # a megabyte each

_FOLDER = "listing"
_PART = re.compile(r"part-\d+\.parquet")


class ListingWriter:
    """Writes the listing part by part. First removes what an interrupted writer left.

    first: ordinal of the first part. Parts with lower ordinals belong to a frozen listing and stay.
    before_write: called before each change, which it prevents by raising a CaptionerError.
    """

    def __init__(
        self,
        run_folder: Place,
        on_progress: Callable[[int], None],
        first: int = 0,
        before_write: Callable[[], None] = lambda: None,
    ) -> None:
        self._first = first
        self._before_write = before_write
        self._folder = as_location(run_folder) / _FOLDER
        self._store = open_store(run_folder)
        self._on_progress = on_progress
        self.kept: tuple[pa.Field, ...] = ()
        self.units: list[Unit] = []
        self._held: list[tuple[object, ...]] = []
        self._num_further = 0
        self.discard()

    @property
    def num_rows(self) -> int:
        """Rows added so far."""
        return sum(unit.num_rows or 0 for unit in self.units) + len(self._held)

    def add(
        self,
        uri: str,
        size_bytes: int | None = None,
        image_id: str | None = None,
        kept: Sequence[Any] = (),
        num_further: int = 0,
    ) -> None:
        """Append one image; an empty URI is a row without an image. The default id is the URI as shown.

        num_further: images of its row that are left out."""
        self._num_further += num_further
        self._held.append((uri or None, image_id or urls.shown(uri), size_bytes, *kept))
        if len(self._held) == ROWS_PER_LISTING:
            self._flush()

    def close(self) -> tuple[Unit, ...]:
        """Write the last part and return the units."""
        if self._held:
            self._flush()
        return tuple(self.units)

    def discard(self) -> None:
        """Remove every part, also those of an earlier, interrupted writer."""
        self.units, self._held = [], []
        with output_errors(self._folder):
            self._before_write()
            for name in self._store.names(self._folder):
                if not _PART.fullmatch(name) or int(name[5:-8]) >= self._first:
                    self._store.remove(self._folder / name)

    def _flush(self) -> None:
        ordinal = self._first + len(self.units)
        name = f"part-{ordinal:06d}.parquet"
        data = _parquet(self._held, self.kept)
        with output_errors(self._folder):
            self._store.write_atomic(self._folder / name, data, self._before_write)
        path = urls.join(_FOLDER, name)
        self.units.append(
            Unit(
                ordinal=ordinal,
                kind="listing",
                path=path,
                name=path,
                num_rows=len(self._held),
                size_bytes=len(data),
                num_further=self._num_further,
            )
        )
        self._held, self._num_further = [], 0
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
    store: Store, place: Place, unit: Unit, kept: Sequence[pa.Field], limits: Limits, done: Done | None
) -> Iterator[pa.Table]:
    """Yield the rows of one part that are not done, as one table. Raises StoreError."""
    file = open_parquet_file(store.read_bytes(place))
    positions = positions_left(file.metadata.num_rows, done, limits)
    table = _take(file, positions, ["uri", "image_id", *(field.name for field in kept)])
    taken = {name: table[name] for name in table.column_names}
    is_empty = pc.is_null(table["uri"])
    reject = {
        "reason": pc.if_else(is_empty, str(RejectReason.EMPTY), pa.scalar(None, pa.string())),
        "detail": pc.if_else(is_empty, "the list has no URI here", pa.scalar(None, pa.string())),
    }
    yield source_table(unit.ordinal, {"position": positions, **taken, **reject}, kept)


def _take(file: pq.ParquetFile, positions: npt.NDArray[np.int64], names: Sequence[str]) -> pa.Table:
    """Return the rows at ascending positions. Reads only the row groups that hold them."""
    starts = np.cumsum([0, *(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))])
    groups = np.unique(np.searchsorted(starts, positions, side="right") - 1)
    table = file.read_row_groups(groups.tolist(), columns=list(names), use_threads=False)
    held = np.concatenate([np.empty(0, np.int64), *(np.arange(starts[group], starts[group + 1]) for group in groups)])
    return table.take(np.searchsorted(held, positions))


def listed_uri(unit: Unit, run_folder: Place, position: int) -> str | None:
    """Return the URI of one row of a part; None where it has none. Raises StoreError."""
    part = as_location(run_folder) / unit.path
    uris = open_parquet_file(open_store(part).read_bytes(part)).read(["uri"], use_threads=False).column(0)
    uri: str | None = uris[position].as_py() if position < len(uris) else None
    return uri


def listed_ids(frozen: Frozen, run_folder: Place) -> Callable[[int], pa.ChunkedArray | None]:
    """Return a function from a unit's ordinal to its image_ids; None for a unit that is not part of the listing.

    It caches the units that were last asked for. Raises StoreError.
    """
    store = open_store(run_folder)
    paths = {unit.ordinal: unit.path for unit in frozen.units if unit.kind == "listing"}

    @functools.lru_cache(_KEPT_UNITS)
    def ids(ordinal: int) -> pa.ChunkedArray | None:
        if ordinal not in paths:
            return None
        data = store.read_bytes(as_location(run_folder) / paths[ordinal])
        return open_parquet_file(data).read(["image_id"], use_threads=False).column(0)

    return ids
