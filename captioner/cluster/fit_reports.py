"""What the workers of a fit tell its driver: their starts, their rows of the log, and the errors they meet. No Ray.

An actor of it runs on the driver's node. A class of plain methods, tested as one.
"""

from captioner.cluster.worker_errors import WorkerError
from captioner.training.fit.row import Row

__all__ = ["FitReports"]


class FitReports:
    """What has been reported and not yet taken."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._starts: list[str] = []
        self._ranks: dict[WorkerError, set[int]] = {}
        self._shared: WorkerError | None = None
        self._errors: dict[str, WorkerError] = {}

    def add_start(self, worker: str, line: str) -> None:
        """Note that a worker has started, which makes its error void."""
        self._errors.pop(worker, None)
        self._starts.append(line)

    def take_starts(self) -> list[str]:
        """Return a line for each worker that has started since the last call."""
        lines, self._starts = self._starts, []
        return lines

    def add_row(self, row: Row) -> None:
        """Note a row of the log."""
        self._rows.append(row)

    def take_rows(self) -> list[Row]:
        """Return the rows since the last call."""
        rows, self._rows = self._rows, []
        return rows

    def note_error(self, worker: str, error: WorkerError) -> None:
        """Note what a worker is about to raise."""
        self._errors.pop(worker, None)
        self._errors[worker] = error

    def note_shared_error(self, error: WorkerError, rank: int, num_workers: int) -> None:
        """Note what a worker has met that every worker may meet."""
        ranks = self._ranks.setdefault(error, set())
        ranks.add(rank)
        if len(ranks) == num_workers:
            self._shared = error

    def shared_error(self) -> WorkerError | None:
        """Return the error that all workers have met."""
        return self._shared

    def error(self) -> WorkerError | None:
        """Return the error that all workers have met, or else the last one of a worker that has not started again."""
        return self._shared or next(reversed(self._errors.values()), None)
