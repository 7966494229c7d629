"""The images behind the rows of a table, read again from where the job found them.

    images = TableImages.of(table, storage_options)
    for seen in images.see(keys, look, image_config): ...     # key -> what `look` made of it, or a reject

The frozen input says which unit holds a row: a listing gives its URI, a Parquet file is read up to the wanted row of a
row group, a tar up to the wanted member. What is no longer there is a reject with its reason. Knows no captions, and
not what an image looks like.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from captioner.config import ImageConfig, InputConfig
from captioner.rows import Reject, RejectReason, row_key, split_key
from captioner.sources import Columns, Fetcher, Frozen, Limits, Unit, load_frozen, read_unit
from captioner.sources.faults import StoreError, output_errors
from captioner.sources.urls import scheme, shared_options
from captioner.tables import CaptionTable

__all__ = ["Look", "TableImages"]

T = TypeVar("T")

Look = Callable[[list[int], list[bytes | Reject]], Sequence[T]]
"""Makes something of some images, given their keys too. Called from several threads at once."""

_UNITS_AT_ONCE = 8  # they wait for their stores
_ROWS_AT_ONCE = 32
_GONE = Reject(RejectReason.MISSING, "the input that was frozen for this table has no such row any more")


@dataclass(frozen=True, kw_only=True)
class TableImages:
    """Where the images of one table are, and how to get at them."""

    frozen: Frozen
    input_path: str
    run_folder: str
    table_options: Mapping[str, Any] = field(repr=False)
    access: InputConfig = field(repr=False)

    @classmethod
    def of(
        cls,
        table: CaptionTable,
        table_options: Mapping[str, Any],
        image_options: Mapping[str, Any] | None = None,
        *,
        allow_local_uris: bool = False,
    ) -> "TableImages":
        """Return the images of a table.

        Its options are those of the images too, unless others are given or they lie on another kind of store."""
        with output_errors(table.url):
            frozen = load_frozen(table.run_folder, table_options) or Frozen(kind="files", units=())
            input_path = str((table.identity() or {}).get("input", ""))
        owner = input_path if scheme(table.url) == "file" else table.url  # nothing local needs options of its own
        options = shared_options(input_path, owner, table_options) if image_options is None else image_options
        return cls(
            frozen=frozen,
            input_path=input_path,
            run_folder=table.run_folder,
            table_options=table_options,
            access=InputConfig(storage_options=dict(options), allow_local_uris=allow_local_uris),
        )

    def see(self, keys: Collection[int], look: Look[T], image: ImageConfig) -> Iterator[dict[int, T | Reject]]:
        """Yield, unit by unit, what `look` made of each key's image, or why it was not read. Never raises for an image.

        Several units are read at once, and some 30 images of each."""
        wanted = _by_unit(keys)
        units = [unit for unit in self.frozen.units if unit.ordinal in wanted]
        if unknown := set(wanted) - {unit.ordinal for unit in units}:
            yield {row_key(unit, place): _GONE for unit in unknown for place in wanted[unit]}
        fetcher = Fetcher(self.input_path, self.access, image)
        with ThreadPoolExecutor(_UNITS_AT_ONCE) as threads:
            yield from threads.map(partial(self._see_unit, wanted=wanted, fetcher=fetcher, look=look), units)

    def _see_unit(
        self, unit: Unit, *, wanted: Mapping[int, list[int]], fetcher: Fetcher, look: Look[T]
    ) -> dict[int, T | Reject]:
        """Return what was made of one unit's images; of those that it does not give, its fault."""
        found: dict[int, T | Reject] = {}
        positions, fault = wanted[unit.ordinal], _GONE
        try:
            for rows in self._rows(unit, positions):
                keys: list[int] = rows.column("key").to_pylist()
                found |= zip(keys, look(keys, fetcher.fetch_rows(rows)), strict=True)
        except StoreError as error:
            fault = error.fault.reject
        return {key: found.get(key, fault) for key in (row_key(unit.ordinal, position) for position in positions)}

    def _rows(self, unit: Unit, positions: list[int]) -> Iterator[pa.Table]:
        done = np.ones(max(positions) + 1, bool)
        done[positions] = False
        return read_unit(
            unit,
            Columns(image=self.frozen.columns.image),
            self.access,
            run_folder=self.run_folder,
            output_options=self.table_options,
            limits=Limits(rows_per_block=_ROWS_AT_ONCE, stop_at=len(done)),
            done=done,
        )


def _by_unit(keys: Collection[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for key in keys:
        unit, position = split_key(key)
        found.setdefault(unit, []).append(position)
    return found
