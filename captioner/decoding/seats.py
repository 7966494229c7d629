"""Which job sits where, and for how long. A seat is the slots of one search. Host side; knows no tensors."""

from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Job = TypeVar("Job")
Places = NDArray[np.int64]


class Seats(Generic[Job]):
    """A fixed number of seats."""

    def __init__(self, num_seats: int) -> None:
        self._jobs: list[Job | None] = [None] * num_seats
        self._is_taken = np.zeros(num_seats, bool)
        self._num_steps = np.zeros(num_seats, np.int64)

    @property
    def num_taken(self) -> int:
        """Seats with a job."""
        return int(np.count_nonzero(self._is_taken))

    @property
    def num_free(self) -> int:
        """Seats without one."""
        return len(self._jobs) - self.num_taken

    @property
    def taken(self) -> Places:
        """The seats with a job, rising."""
        return np.flatnonzero(self._is_taken)

    @property
    def most_steps(self) -> int:
        """Steps that the longest-seated job has been through."""
        return int(self._num_steps.max())

    def take(self, jobs: Sequence[Job]) -> Places:
        """Give each job a seat, the first that are free; there must be as many."""
        seats = np.flatnonzero(~self._is_taken)[: len(jobs)]
        for seat, job in zip(seats.tolist(), jobs, strict=True):
            self._jobs[seat] = job
        self._is_taken[seats] = True
        return seats

    def leave(self, seat: int) -> Job:
        """Free a seat; return the job that had it."""
        job = self._jobs[seat]
        assert job is not None
        self._jobs[seat], self._is_taken[seat], self._num_steps[seat] = None, False, 0
        return job

    def close_gaps(self) -> tuple[Places, Places]:
        """Move the last jobs to free seats before them, so that no gap is left; return from where and to where."""
        taken = self.taken
        sources = taken[taken >= len(taken)]
        targets = np.flatnonzero(~self._is_taken[: len(taken)])
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            num_steps = self._num_steps[source]
            self._jobs[target], self._is_taken[target] = self.leave(source), True
            self._num_steps[target] = num_steps
        return sources, targets

    def count_step(self) -> None:
        """Count one more step for every job."""
        self._num_steps += self._is_taken
