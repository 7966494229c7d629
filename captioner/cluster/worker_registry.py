"""What the workers of a job tell its driver: starts, errors, images that are finished. A plain class; no Ray.

An actor of it runs on the driver's node, so that what it knows of a worker outlives the worker's process and node.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from captioner.cluster.eviction import Worker
from captioner.cluster.restarts import Start
from captioner.cluster.worker_errors import WorkerError

__all__ = ["WorkerRegistry"]


class WorkerRegistry:
    """The workers of one job by their ids, and the errors that they raised.

    may_evict: whether workers are evicted, which takes a handle of each and whether it is busy. Ray frees a worker that
    its pool gives up only when no handle is left, so none is kept without need.
    """

    def __init__(self, may_evict: bool = False) -> None:
        self._may_evict = may_evict
        self._workers: dict[str, Worker] = {}
        self._handles: dict[str, Any] = {}
        self._errors: dict[str, WorkerError] = {}
        self._finished: dict[str, tuple[int, int]] = {}  # of a worker's earlier processes, and of this one

    def last_start(self, worker_id: str) -> Start | None:
        """Return the last start of a worker, None of a new one."""
        known = self._workers.get(worker_id)
        return known.start if known else None

    def note_start(self, worker_id: str, stage: str, start: Start, handles: Mapping[str, Any]) -> bool:
        """Note that a worker has started, or has loaded; return whether it is to say when it is busy.

        handles: the worker's own by its id; Ray would resolve one that is an argument by itself.
        """
        self._workers[worker_id] = Worker(id=worker_id, stage=stage, start=start)
        self._errors.pop(worker_id, None)
        if self._may_evict:
            self._handles.update(handles)
        return self._may_evict

    def note_busy(self, worker_id: str, is_busy: bool) -> None:
        """Note whether a worker has a call to serve."""
        self._workers[worker_id] = replace(self._workers[worker_id], is_busy=is_busy)

    def note_eviction(self, worker_id: str) -> None:
        """Note that a worker has no place until it starts again."""
        self._workers[worker_id] = replace(self._workers[worker_id], is_evicted=True)

    def note_error(self, source: str, error: WorkerError) -> None:
        """Note what a worker, or a task that reads or writes, is about to raise."""
        self._errors.pop(source, None)
        self._errors[source] = error

    def note_success(self, task: str) -> None:
        """Note that a task has succeeded, which makes the error of an earlier try void."""
        self._errors.pop(task, None)

    def note_finished(self, worker_id: str, num_images: int) -> None:
        """Note how many images a worker has finished since its process began."""
        known = self._finished.setdefault(worker_id, (0, 0))
        before = known[0] if num_images >= known[1] else sum(known)  # a new process counts from 0
        self._finished[worker_id] = before, num_images

    def num_finished(self) -> int:
        """Return how many images all workers have finished; those of a worker that died may count twice."""
        return sum(map(sum, self._finished.values()))

    def workers(self) -> list[Worker]:
        """Return all workers that have ever started."""
        return list(self._workers.values())

    def handle(self, worker_id: str) -> Any:
        """Return a handle that ends a worker, None where none is kept."""
        return self._handles.get(worker_id)

    def error(self) -> WorkerError | None:
        """Return the last error of those whose worker has not started again, or whose task has not succeeded, since."""
        return next(reversed(self._errors.values()), None)
