"""The images behind exported rows, read again by the job's own reader: their bytes untouched, or where they lie.

Knows keys, and nothing of what is written.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa

from captioner.config import ImageConfig
from captioner.errors import JobError
from captioner.inputs import Fetcher, Unit
from captioner.schema import TRANSIENT_REASONS, Reject, row_key, split_key
from captioner.storage.faults import StoreError
from captioner.tables.parts import read_ahead
from captioner.tables.table_images import GONE, TableImages

__all__ = ["ImageSource"]

_BLOCKS_AT_ONCE = 3


@dataclass(frozen=True)
class ImageSource:
    """The images of one table. Can be pickled."""

    images: TableImages
    config: ImageConfig = field(default_factory=ImageConfig)

    def read(self, keys: np.ndarray) -> Iterator[tuple[int, bytes | Reject]]:
        """Yield key and bytes of each image, in the order of the sorted keys, or why it cannot be read.

        Memory holds some hundred images. Raises JobError where another try may help: nothing is then left out."""
        for block in self._blocks(keys):
            for key, image in block:
                if isinstance(image, Reject) and image.reason in TRANSIENT_REASONS:
                    raise JobError(
                        f"image {split_key(key)} of the table cannot be read: {image.reason}, {image.detail}. The same"
                        " command continues"
                    )
                yield key, image

    def _blocks(self, keys: np.ndarray) -> Iterator[list[tuple[int, bytes | Reject]]]:
        """Yield the images of some rows at a time, while those of the next ones are fetched."""

        def fetch(rows: pa.Table | tuple[int, Reject]) -> list[tuple[int, bytes | Reject]]:
            return (
                [rows]
                if isinstance(rows, tuple)
                else list(zip(_keys(rows), self._fetcher.fetch_rows(rows), strict=True))
            )

        return (block for _, block in read_ahead(fetch, self._rows(keys), _BLOCKS_AT_ONCE))

    def uris(self, keys: np.ndarray) -> Iterator[tuple[int, str]]:
        """Yield key and URI of each image, in the order of the sorted keys.

        The URI is empty where it has none, as a member of a tar, or where the table may not lead to it."""
        for ordinal in np.unique(keys >> 32).tolist():
            of_unit = keys[keys >> 32 == ordinal]
            if (unit := self._units.get(ordinal)) and unit.kind == "webdataset":
                yield from ((key, "") for key in of_unit.tolist())
                continue
            for rows in self._rows(of_unit):
                if isinstance(rows, tuple):
                    yield rows[0], ""
                    continue
                for key, uri in zip(_keys(rows), rows.column("uri").to_pylist(), strict=True):
                    yield key, uri if uri and not self._fetcher.refusal(uri) else ""

    @cached_property
    def _fetcher(self) -> Fetcher:
        images = self.images
        return Fetcher(images.input_path, images.access, self.config, named=images.named.url_with_secrets)

    @cached_property
    def _units(self) -> dict[int, Unit]:
        return {unit.ordinal: unit for unit in self.images.frozen.units}

    def _rows(self, keys: np.ndarray) -> Iterator[pa.Table | tuple[int, Reject]]:
        """Yield the rows of the input, and a key with its reject for each that cannot be had, in order."""
        for ordinal in np.unique(keys >> 32).tolist():
            positions = [split_key(key)[1] for key in keys[keys >> 32 == ordinal].tolist()]
            left, fault = iter(positions), GONE
            waiting = next(left, None)
            try:
                if unit := self._units.get(ordinal):
                    self.images.check(unit, self._fetcher)
                    for rows in self.images.rows(unit, positions):
                        for key in _keys(rows):
                            while waiting is not None and row_key(ordinal, waiting) < key:
                                yield row_key(ordinal, waiting), GONE
                                waiting = next(left, None)
                            waiting = next(left, None)
                        yield rows
            except StoreError as error:
                fault = error.fault.reject_of_unit
            while waiting is not None:
                yield row_key(ordinal, waiting), fault
                waiting = next(left, None)


def _keys(rows: pa.Table) -> list[int]:
    found: list[int] = rows.column("key").to_pylist()
    return found
