"""What has arrived from the stores of a job, in this run or an earlier one: asked for once a store seems out of reach.

Reads the table and the frozen input, and only then: a worker has them at hand anyway.
"""

from collections.abc import Sequence
from functools import cached_property

from captioner.captioning.job import output_location
from captioner.config import CaptionJobConfig
from captioner.errors import CaptionerError
from captioner.inputs import Unit, load_frozen
from captioner.inputs.listing import listed_uri
from captioner.schema import split_key
from captioner.storage.faults import StoreError
from captioner.tables import CaptionTable

__all__ = ["Witnesses"]

_MAX_PARTS = 16


class Witnesses:
    """The images and files of one job whose captions stand in its table."""

    def __init__(self, config: CaptionJobConfig) -> None:
        self._config = config

    def path_of(self, unit: int) -> str | None:
        """Return the URL of the file that a unit is; None for a part of the listing, or where that is not known."""
        found = self._units.get(unit)
        return found.path if found and found.kind != "listing" else None

    def earlier(self) -> Sequence[str]:
        """Return URLs of some images, or of the files that they are in, that have captions."""
        return self._earlier

    @cached_property
    def _earlier(self) -> list[str]:
        try:
            parts = self._table.parts("captions")
            some = parts[:: max(1, -(-len(parts) // _MAX_PARTS))]
            keys = [part["key"][0].as_py() for url in some if (part := self._table.read(url, ["key"])) and len(part)]
            found = [self._url_of(*split_key(key)) for key in keys]
        except (CaptionerError, StoreError):
            return []
        return [url for url in found if url]

    def _url_of(self, unit: int, position: int) -> str | None:
        if path := self.path_of(unit):
            return path
        return listed_uri(self._units[unit], self._table.run_folder, position) if unit in self._units else None

    @cached_property
    def _table(self) -> CaptionTable:
        return CaptionTable(output_location(self._config))

    @cached_property
    def _units(self) -> dict[int, Unit]:
        try:
            frozen = load_frozen(self._table.run_folder)
        except (CaptionerError, StoreError):
            frozen = None
        return {unit.ordinal: unit for unit in frozen.units} if frozen else {}
