"""The shards of an export on Ray: each is a task that reads its images and writes its file.

The driver reads the rows, for it has the table's connection, and never holds more than those of the running tasks.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import RayError

from captioner.captioning.resources import Cluster
from captioner.cluster.session import OFF_MODEL_SELECTOR, joined_cluster
from captioner.cluster.worker_errors import WorkerError
from captioner.config import worker_range
from captioner.errors import JobError
from captioner.export import Pending, write_shard
from captioner.export.request import ExportFormat, Outcome, Request

__all__ = ["run"]

log = logging.getLogger("captioner")

_TRIES = 3  # of a task whose process or node died


def run(pending: Pending) -> Iterator[Outcome]:
    """Write the files of shards, several at a time, and yield what became of each as it ends. Raises JobError."""
    with redirect_stdout(sys.stderr), joined_cluster() as cluster:
        request = ray.put((pending.form, pending.request))
        task = ray.remote(_write).options(num_cpus=1, max_retries=_TRIES, label_selector=OFF_MODEL_SELECTOR)
        left, running = iter(pending.numbers), set[Any]()
        at_once = _num_workers(pending.request, cluster)
        while True:
            while len(running) < at_once and (number := next(left, None)) is not None:
                running.add(task.remote(request, number, list(pending.rows(number))))
            if not running:
                return
            ready, _ = ray.wait(list(running), num_returns=1)
            running -= set(ready)
            yield _outcome(ready[0])


def _num_workers(request: Request, cluster: Cluster) -> int:
    """Return how many tasks run at once: as --workers says, else one a CPU."""
    given = worker_range(request.config.workers, "--workers")
    return given[1] if given else max(1, int(cluster.cpus))


def _write(request: tuple[ExportFormat, Request], number: int, rows: list[pa.RecordBatch]) -> Outcome | WorkerError:
    """Write one shard in a task. An error comes back as data: Ray would make a text of it."""
    try:
        return write_shard(*request, number, iter(rows))
    except Exception as error:  # of a store, of the images, a defect: the driver says which
        return WorkerError.of(error)


def _outcome(reference: Any) -> Outcome:
    try:
        found = ray.get(reference)
    except RayError as error:
        raise JobError(
            f"a task that reads images ended without a word: {' '.join(str(error).split())[:300]}. The same command"
            " continues"
        ) from error
    if isinstance(found, WorkerError):
        raise found.as_exception()
    assert isinstance(found, Outcome)
    log.info("shard=%d rows=%d size_bytes=%d", found.number, found.rows, sum(found.files.values()))
    return found
