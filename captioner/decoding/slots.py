"""Which slots are in use, by which search, and how far it is; which images are stored. Host side; knows no tensors.

Slots are allocated in lanes. A lane is the neighbouring slots of one search: one slot where each caption is decoded on
its own, num_beams slots in a beam search. A search waits in its lane until its prompt is computed, then it decodes.
"""

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Lanes = NDArray[np.int64]
"""Numbers of lanes: lane n is slots n * slots_per_lane and the next."""


class HasLane(Protocol):
    """What has a lane, and is told when it moves."""

    lane: int


Search = TypeVar("Search", bound=HasLane)


class SlotAllocator(Generic[Search]):
    """Gives searches a fixed number of lanes."""

    def __init__(self, num_lanes: int) -> None:
        self._searches: list[Search | None] = [None] * num_lanes
        self._is_used = np.zeros(num_lanes, bool)
        self._is_decoding = np.zeros(num_lanes, bool)
        self._first_columns = np.zeros(num_lanes, np.int64)
        self._columns = np.zeros(num_lanes, np.int64)
        self._arrays = (self._is_used, self._is_decoding, self._first_columns, self._columns)

    def __getitem__(self, lane: int) -> Search:
        """Return the search of a used lane."""
        search = self._searches[lane]
        assert search is not None
        return search

    @property
    def num_used(self) -> int:
        """Lanes with a search."""
        return int(np.count_nonzero(self._is_used))

    @property
    def num_free(self) -> int:
        """Lanes without a search."""
        return len(self._searches) - self.num_used

    @property
    def used(self) -> Lanes:
        """The lanes with a search, in ascending order."""
        return np.flatnonzero(self._is_used)

    @property
    def decoding(self) -> Lanes:
        """The lanes whose search decodes, in ascending order."""
        return np.flatnonzero(self._is_decoding)

    @property
    def generated(self) -> tuple[int, int]:
        """The own columns from the first to past the last that hold generated tokens after the next step."""
        used = self.used
        return int(self._first_columns[used].min(initial=2**62)) + 1, int(self._columns[used].max(initial=0)) + 1

    def allocate(self, searches: Sequence[Search], first_columns: Sequence[int]) -> Lanes:
        """Give each search the next free lane, and return these lanes; there must be enough.

        first_columns: the own column at which each begins to decode."""
        lanes = np.flatnonzero(~self._is_used)[: len(searches)]
        for lane, search in zip(lanes.tolist(), searches, strict=True):
            self._searches[lane], search.lane = search, lane
        self._is_used[lanes] = True
        self._first_columns[lanes] = self._columns[lanes] = first_columns
        return lanes

    def start(self, searches: Sequence[Search]) -> None:
        """Let searches decode from the next step on."""
        self._is_decoding[[search.lane for search in searches]] = True

    def restart(self, lane: int) -> None:
        """Let the search of a lane decode from its first column once more."""
        self._columns[lane] = self._first_columns[lane]

    def free(self, lane: int) -> Search:
        """Free a lane; return the search that had it."""
        search = self[lane]
        self._searches[lane] = None
        for array in self._arrays:
            array[lane] = 0
        return search

    def close_gaps(self) -> tuple[Lanes, Lanes]:
        """Move the last searches to free lanes before them, so that no gap is left; return the old and new lanes."""
        used = self.used
        sources = used[used >= len(used)]
        targets = np.flatnonzero(~self._is_used[: len(used)])
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            for array in self._arrays:
                array[target] = array[source]
            search = self.free(source)
            self._searches[target], search.lane = search, target
        return sources, targets

    def count_step(self) -> None:
        """Count one more column for every search that decodes."""
        self._columns += self._is_decoding


class PrefixAllocator:
    """Gives images a fixed number of places in the prefix store; a place is free when no search reads it."""

    def __init__(self, num_prefixes: int) -> None:
        self._num_readers = np.zeros(num_prefixes, np.int64)

    @property
    def num_free(self) -> int:
        """Places without an image."""
        return int(np.count_nonzero(self._num_readers == 0))

    def allocate(self, num_readers: int) -> int:
        """Return the first free place, now of an image that so many searches read."""
        place = int(np.flatnonzero(self._num_readers == 0)[0])
        self._num_readers[place] = num_readers
        return place

    def release(self, place: int) -> None:
        """Count one reader less."""
        self._num_readers[place] -= 1
        assert self._num_readers[place] >= 0
