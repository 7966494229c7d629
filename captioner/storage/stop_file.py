"""The file that tells the tasks of a run, on any machine, to start nothing more."""

from contextlib import suppress
from dataclasses import dataclass

from captioner.storage.faults import StoreError
from captioner.storage.location import Location, Place, as_location
from captioner.storage.opening import open_store

__all__ = ["StopFile"]


@dataclass(frozen=True)
class StopFile:
    """A file in the run folder that exists from the first signal to the end of a run."""

    run_folder: Place
    run_id: str

    @property
    def location(self) -> Location:
        """Where the file is."""
        return as_location(self.run_folder) / "stopping" / self.run_id

    def exists(self) -> bool:
        """Return whether the run is to stop; False if the store does not answer."""
        with suppress(StoreError):
            open_store(self.location).read_bytes(self.location)  # one request; `info` takes three
            return True
        return False

    def write(self) -> None:
        """Tell the tasks. Raises StoreError."""
        open_store(self.location).write_atomic(self.location, b"")

    def remove(self) -> None:
        """Remove the file, if the store lets us."""
        with suppress(StoreError):
            open_store(self.location).remove(self.location)
