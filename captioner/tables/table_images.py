"""The images behind the rows of a table, read again from the input of its job.

    images = TableImages.of(table, storage_options)
    for found in images.map_images(keys, fn, image_config): ...     # key -> what `fn` made of it, or a reject

The frozen input says which unit holds a row: a listing gives its URI, a Parquet file is read up to the wanted row of a
row group, a tar up to the wanted member. An image that is no longer there is a reject with its reason. Knows no
captions, and decodes nothing.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from captioner.config import ImageAccessConfig, ImageConfig, InputConfig
from captioner.inputs import Fetcher, Frozen, Limits, Unit, load_frozen, read_unit
from captioner.inputs.access import host_guard
from captioner.schema import Reject, RejectReason, row_key, split_key
from captioner.storage import Location
from captioner.storage.faults import Fault, StoreError, output_errors
from captioner.storage.http_store import guarded
from captioner.tables import CaptionTable
from captioner.tables.moved_images import MovedImages

__all__ = ["GONE", "ImageFunction", "TableImages"]

T = TypeVar("T")

log = logging.getLogger(__name__)

ImageFunction = Callable[[list[int], list[bytes | Reject]], Sequence[T]]
"""(keys, images) -> one result an image. Several threads call it at once."""

_UNITS_AT_ONCE = 8  # they wait for their stores
_ROWS_AT_ONCE = 32
_NEAR_ROWS = 1 << 24
GONE = Reject(RejectReason.MISSING, "the input that was frozen for this table has no such row any more")


@dataclass(frozen=True, kw_only=True)
class TableImages:
    """Where the images of one table are, and how to read them.

    named: what this user named on the command line. What a table on a store says of its input is trusted no more than
    a list there."""

    frozen: Frozen
    input_path: str
    named: Location
    run_folder: Location
    access: InputConfig = field(repr=False)
    moved: MovedImages | None = None
    """Another folder that the images lie in now; None where they are where the job read them."""

    @classmethod
    def of(cls, table: CaptionTable, config: ImageAccessConfig | None = None) -> "TableImages":
        """Return the images of a table.

        Its options hold for the images too, unless others are given or the images are on another kind of store."""
        with output_errors(table.location):
            frozen = load_frozen(table.run_folder) or Frozen(kind="files", units=())
            input_path = str((table.identity() or {}).get("input", ""))
        config = config or ImageAccessConfig()
        options = config.image_storage_options
        if options is None:
            options = _options_of_images(config.image_root or input_path, table.location)
        root = Location(config.image_root, options) if config.image_root else None
        return cls(
            frozen=frozen,
            input_path=root.url_with_secrets if root else input_path,
            named=root or table.location,
            moved=MovedImages.of(input_path, root) if root else None,
            run_folder=table.run_folder,
            access=InputConfig(
                storage_options=dict(options),
                allow_local_uris=config.allow_local_uris,
                deny_private_hosts=config.deny_private_hosts,
            ),
        )

    def map_images(
        self, keys: Collection[int], fn: ImageFunction[T], image: ImageConfig
    ) -> Iterator[dict[int, T | Reject]]:
        """Yield, unit by unit, what `fn` made of each key's image, or why it was not read. Never raises for an image.

        Several units are read at once, and some 30 images of each."""
        wanted = _by_unit(keys)
        units = [unit for unit in self.frozen.units if unit.ordinal in wanted]
        if unknown := set(wanted) - {unit.ordinal for unit in units}:
            yield {row_key(unit, place): GONE for unit in unknown for place in wanted[unit]}
        fetcher = Fetcher(self.input_path, self.access, image, named=self.named.url_with_secrets)
        with ThreadPoolExecutor(_UNITS_AT_ONCE) as threads:
            yield from threads.map(partial(self._map_unit, wanted=wanted, fetcher=fetcher, fn=fn), units)

    def _map_unit(
        self, unit: Unit, *, wanted: Mapping[int, list[int]], fetcher: Fetcher, fn: ImageFunction[T]
    ) -> dict[int, T | Reject]:
        """Return what was made of one unit's images, and the unit's fault for those that it does not have."""
        found: dict[int, T | Reject] = {}
        positions, fault = wanted[unit.ordinal], GONE
        try:
            self.check(unit, fetcher)
            for rows in self.rows(unit, positions):
                keys: list[int] = rows.column("key").to_pylist()
                found |= zip(keys, fn(keys, fetcher.fetch_rows(rows)), strict=True)
        except StoreError as error:
            fault = error.fault.reject
        return {key: found.get(key, fault) for key in (row_key(unit.ordinal, position) for position in positions)}

    def paths(self, keys: Collection[int]) -> dict[int, str]:
        """Return where each key's image lies, without reading it: its own URI, or the file that holds it.

        One whose listing cannot be read is left out."""
        wanted = _by_unit(keys)
        units = [unit for unit in self.frozen.units if unit.ordinal in wanted and unit.reject is None]
        with ThreadPoolExecutor(_UNITS_AT_ONCE) as threads:
            found = threads.map(lambda unit: self._paths_in(unit, wanted[unit.ordinal]), units)
            return {key: path for paths in found for key, path in paths.items()}

    def _paths_in(self, unit: Unit, positions: list[int]) -> dict[int, str]:
        try:
            return dict(self._each_path(unit, positions))
        except StoreError as error:
            log.info("unit=%d paths=%s", unit.ordinal, error.fault.reason)
            return {}

    def _each_path(self, unit: Unit, positions: list[int]) -> Iterator[tuple[int, str]]:
        if unit.kind != "listing":
            path = (self.moved.unit(unit) if self.moved else unit).path
            yield from ((row_key(unit.ordinal, position), path) for position in positions)
            return
        for rows in self.rows(unit, positions):
            uris = zip(rows.column("key").to_pylist(), rows.column("uri").to_pylist(), strict=True)
            yield from ((key, uri) for key, uri in uris if uri is not None)

    def check(self, unit: Unit, fetcher: Fetcher) -> None:
        """Raise StoreError for a Parquet file or tar that a table on a store may not lead to."""
        unit = self.moved.unit(unit) if self.moved else unit
        is_file = unit.kind != "listing" and unit.reject is None
        if is_file and (refusal := fetcher.refusal(unit.path)):
            raise StoreError(Fault(refusal.reason, refusal.detail))

    def rows(self, unit: Unit, positions: list[int]) -> Iterator[pa.Table]:
        """Yield the rows of a unit at these positions, if it can have so many, as they are read. Raises StoreError."""
        unit = self.moved.unit(unit) if self.moved else unit
        for near in _near([position for position in positions if position < unit.max_rows]):
            done = np.ones(near[-1] + 1 - near[0], bool)
            done[near - near[0]] = False
            found = read_unit(
                unit,
                replace(self.frozen.columns, id=None, kept=(), kept_from=()),
                self._access_to(unit),
                run_folder=self.run_folder,
                limits=Limits(rows_per_block=_ROWS_AT_ONCE, start_at=int(near[0]), stop_at=int(near[-1]) + 1),
                done=done,
            )
            if self.moved:
                may_be_new = unit.kind != "listing"  # whose URIs are all as the job listed them
                found = (self.moved.rows(rows, may_be_new=may_be_new) for rows in found)
            yield from found

    def _access_to(self, unit: Unit) -> InputConfig:
        """Return how a unit's file is opened: on the web by a session that leads inside only on the table's server."""
        if self.access.allow_local_uris or (self.named.is_local and not self.access.deny_private_hosts):
            return self.access
        home = self.named.url_with_secrets
        options = guarded(unit.path, self.access.storage_options, home, host_guard(self.access, home))
        return replace(self.access, storage_options=options)


def _options_of_images(input_path: str, table: Location) -> dict[str, Any]:
    """Return the table's options, unless the images lie on another kind of store; a local table needs none itself."""
    return table.storage_options if table.is_local else table.beside(input_path).storage_options


def _near(positions: Collection[int]) -> list[np.ndarray]:
    """Return the positions in order, those of at most _NEAR_ROWS rows together: a table may say anything."""
    found = np.unique(np.fromiter(positions, np.int64))
    return np.split(found, np.flatnonzero(np.diff(found // _NEAR_ROWS)) + 1) if len(found) else []


def _by_unit(keys: Collection[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for key in keys:
        unit, position = split_key(key)
        found.setdefault(unit, []).append(position)
    return found
