"""The pictures behind the rows of a table, fetched again from where the job found them.

    pictures = Pictures.of(table, storage_options).get(keys)     # key -> Thumbnail | Reject

The frozen input says which unit holds a row: a listing gives its URI, a Parquet file is read up to the wanted row of a
row group, a tar up to the wanted member. What is no longer there is a reject with its reason. Knows no captions.
"""

import logging
import os
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from captioner.config import ImageConfig, InputConfig
from captioner.images.thumbnails import Thumbnail, Thumbnailer
from captioner.rows import Reject, RejectReason, row_key, split_key
from captioner.sources import Columns, Fetcher, Frozen, Limits, Unit, load_frozen, read_unit
from captioner.sources.faults import StoreError, output_errors
from captioner.sources.urls import scheme, shared_options
from captioner.tables import CaptionTable

__all__ = ["Picture", "Pictures"]

Picture = Thumbnail | Reject

log = logging.getLogger(__name__)

_UNITS_AT_ONCE = 8  # they wait for their stores
_ROWS_AT_ONCE = 32
_IMAGE = ImageConfig(fetch_timeout_s=20, fetch_retries=2)  # a page can do without a picture
_PAGE_BYTES = 14_500_000  # of a page of up to _FULL_PAGE, with its pictures in base64: 15 MB is promised
_FULL_PAGE = 500
_FEWEST_BYTES, _MOST_BYTES = 12 << 10, 64 << 10  # of one picture
_LEAST_BYTES = 4 << 10  # of one picture on a full page whose texts are long
_GONE = Reject(RejectReason.MISSING, "the input that was frozen for this table has no such row any more")


@dataclass(frozen=True, kw_only=True)
class Pictures:
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
    ) -> "Pictures":
        """Return the pictures of a table.

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

    def get(self, keys: Collection[int], page_bytes: int = 0) -> dict[int, Picture]:
        """Return the thumbnail of each key's image, or why there is none. Never raises for an image.

        page_bytes: what the page they are for holds beside them."""
        wanted = _by_unit(keys)
        units = [unit for unit in self.frozen.units if unit.ordinal in wanted]
        log.info("pictures=%d input_files=%d", len(keys), len(units))
        fetcher = Fetcher(self.input_path, self.access, _IMAGE)
        side, max_bytes = _room(len(keys), page_bytes)
        num_cpus = min(8, os.cpu_count() or 1)
        found: dict[int, Picture] = dict.fromkeys(keys, _GONE)
        with (
            Thumbnailer(_IMAGE, side=side, max_bytes=max_bytes, num_processes=num_cpus) as thumbnailer,
            ThreadPoolExecutor(_UNITS_AT_ONCE) as threads,
        ):
            read = partial(self._unit, wanted=wanted, fetcher=fetcher, thumbnailer=thumbnailer)
            for pictures in threads.map(read, units):
                found |= pictures
        return found

    def _unit(
        self, unit: Unit, *, wanted: Mapping[int, list[int]], fetcher: Fetcher, thumbnailer: Thumbnailer
    ) -> dict[int, Picture]:
        """Return the pictures of one unit, as many as it gives; its fault in place of those that it does not."""
        found: dict[int, Picture] = {}
        positions, fault = wanted[unit.ordinal], _GONE
        try:
            for rows in self._rows(unit, positions):
                pictures = thumbnailer.make_all(fetcher.fetch_rows(rows))
                found |= dict(zip(rows.column("key").to_pylist(), pictures, strict=True))
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


def _room(num_pictures: int, page_bytes: int) -> tuple[int, int]:
    """Return how many pixels a side and how many bytes a picture may have on a page of so many.

    page_bytes: what is on the page beside them."""
    fewest = _LEAST_BYTES if num_pictures <= _FULL_PAGE else _FEWEST_BYTES
    share = (_PAGE_BYTES - page_bytes) * 3 // 4 // max(1, num_pictures)
    side = 720 if num_pictures <= 150 else 512 if num_pictures <= 600 else 384
    return side, min(_MOST_BYTES, max(fewest, share))
