"""Supervision of a job's workers: restarts and their limit, eviction of one for another stage, and errors.

    with supervision(allocation, cluster) as registry:        # an actor on the driver's node
        rows.map_batches(supervised(DecodeWorker), fn_constructor_kwargs={"registry": registry, ...}, **RETRIES)

Knows Ray's actors. How many of them there are is in `pools`; what they do is in `captioning` and `training`.
"""

import importlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any

import ray

from captioner.captioning.decode_worker import DecodeWorker
from captioner.captioning.resources import Allocation, Cluster, describe_shortage
from captioner.cluster.eviction import Worker, worker_to_evict
from captioner.cluster.restarts import Start, next_start
from captioner.cluster.session import living_nodes, start_beside_driver
from captioner.cluster.watching import watching
from captioner.cluster.worker_errors import WorkerError, reporting_errors
from captioner.cluster.worker_registry import WorkerRegistry
from captioner.errors import CaptionerError
from captioner.model.light_imports import import_transformers

__all__ = [
    "RETRIES",
    "Serving",
    "num_finished",
    "raising_worker_errors",
    "report_to",
    "reporting_task_errors",
    "supervised",
    "supervision",
    "wait_reason",
]

log = logging.getLogger("captioner")

RETRIES: Mapping[str, Any] = {"max_restarts": -1, "max_task_retries": -1}
"""A spot node takes its workers with it, as often as it likes; `supervised` gives up those that die by themselves.
Until Ray knows that a node is gone, each retry of its tasks fails at once: a small number would soon be used up."""

_ANSWER_S = 5.0  # within which the registry answers the driver: it is on the same node


def supervised(worker: type | str) -> type:
    """Return a class of the same name, made with a `registry` beside the worker's own arguments.

    It tells the registry its starts and its errors, and raises JobError after too many deaths of its process in a row.
    worker: a class, or the name of one with a model as `package.module:Name`, which is imported where the worker runs
    and not here.
    """
    name = worker.rpartition(":")[2] if isinstance(worker, str) else worker.__name__

    def load(self: Any, *arguments: Any, registry: Any, **options: Any) -> None:
        self._report_error = report_to(registry, str(ray.get_runtime_context().get_actor_id()))
        with reporting_errors(self._report_error):
            registration = _Registration(name, registry)
            self._worker = _class_of(worker)(*arguments, **options)
            self._serving = registration.note_loaded()

    def call(self: Any, rows: Any) -> Any:
        with reporting_errors(self._report_error), self._serving:
            return self._worker(rows)

    return type(name, (), {"__init__": load, "__call__": call})


def _class_of(worker: type | str) -> type:
    if isinstance(worker, type):
        return worker
    module, _, name = worker.partition(":")
    import_transformers()
    found: type = getattr(importlib.import_module(module), name)
    return found


class _Registration:
    """Tells the registry that this process starts a worker. Raises JobError after too many deaths in a row."""

    def __init__(self, stage: str, registry: Any) -> None:
        context = ray.get_runtime_context()
        self._stage, self._registry, self._id = stage, registry, str(context.get_actor_id())
        self._handles = {self._id: context.current_actor}
        node = context.get_node_id()
        last = ray.get(registry.last_start.remote(self._id))
        self._start = next_start(last, f"{os.getpid()} {node}", node, alive=living_nodes(), now=time.time())
        self._note(self._start)

    def note_loaded(self) -> AbstractContextManager[object]:
        """Tell the registry that the worker has loaded; return what each of its calls runs in."""
        wants_calls = self._note(replace(self._start, loaded_at=time.time()))
        return Serving(self._registry, self._id) if wants_calls else nullcontext()

    def _note(self, start: Start) -> bool:
        return bool(ray.get(self._registry.note_start.remote(self._id, self._stage, start, self._handles)))


class Serving:
    """Tells the registry when the first of several calls begins and when the last has ended. Waits for no answer."""

    def __init__(self, registry: Any, worker_id: str) -> None:
        self._registry, self._id = registry, worker_id
        self._num_calls, self._lock = 0, threading.Lock()

    def __enter__(self) -> None:
        self._add(1)

    def __exit__(self, *_: object) -> None:
        self._add(-1)

    def _add(self, number: int) -> None:
        with self._lock:  # what is sent under it arrives in order
            before, self._num_calls = self._num_calls, self._num_calls + number
            if not (before and self._num_calls):
                self._registry.note_busy.remote(self._id, self._num_calls > 0)


def report_to(registry: Any, source: str) -> Callable[[WorkerError], None] | None:
    """Return a function that takes an error to the registry, or gives up soon; None where there is no registry.

    source: a worker, whose next start makes the error void, or a task, whose success does.
    """
    if registry is None:
        return None

    def report(error: WorkerError) -> None:
        with suppress(ray.exceptions.RayError):
            ray.get(registry.note_error.remote(source, error), timeout=_ANSWER_S)

    return report


@contextmanager
def reporting_task_errors(registry: Any) -> Iterator[None]:
    """Report what a task that reads or writes raises. Where Ray tries it again and it succeeds, the error is void."""
    if registry is None:
        yield
        return
    task = str(ray.get_runtime_context().get_task_id())  # the same at each try
    with reporting_errors(report_to(registry, task)):
        yield
    with suppress(ray.exceptions.RayError):
        ray.get(registry.note_success.remote(task), timeout=_ANSWER_S)


@contextmanager
def supervision(allocation: Allocation, cluster: Cluster, evict_every_s: float = 10.0) -> Iterator[Any]:
    """Yield the registry for the workers of a job; evict one where a stage that lost all of its own needs the place.

    Only stages that share CPUs evict each other, and only where a lost node is not replaced. Raises what a worker
    raised, as the type that it was.
    """
    may_evict = bool(allocation.worker_cpus) and not cluster.can_grow and len(cluster.node_cpus) > 1
    registry = start_beside_driver(WorkerRegistry, may_evict)
    evicting = watching(_Eviction(registry), every_s=evict_every_s, name="eviction") if may_evict else nullcontext()
    with raising_worker_errors(registry), evicting:
        yield registry
    ray.kill(registry)


class _Eviction:
    """Evicts a worker once two calls in a row find that it is to make way: Ray has had time to find another place."""

    def __init__(self, registry: Any) -> None:
        self._registry = registry
        self._before: Worker | None = None

    def __call__(self) -> None:
        found = worker_to_evict(_ask(self._registry.workers, []), living_nodes())
        if found and found == self._before:
            log.info("evicted=%s reason=%s", found.stage, "a node is gone, and a stage has no place for any worker")
            if handle := _ask(self._registry.handle, None, found.id):
                _ask(self._registry.note_eviction, None, found.id)  # before it can have started again
                ray.kill(handle, no_restart=False)  # it restarts once there is room
        self._before = found


@contextmanager
def raising_worker_errors(registry: Any) -> Iterator[None]:
    """Raise, in place of an error of Ray, the error of the worker that caused it, or else a JobError with its text."""
    try:
        yield
    except ray.exceptions.RayError as error:
        raise _cause(error, registry) from error


def _cause(error: ray.exceptions.RayError, registry: Any) -> CaptionerError:
    reported: WorkerError | None = _ask(registry.error, None)
    if reported is None:
        cause = getattr(error, "cause", None)  # of a task
        reported = WorkerError.of(cause) if cause else WorkerError("JobError", f"the job stopped: {error}")
    return reported.as_exception()


def num_finished(registry: Any) -> int:
    """Return how many images the model workers have finished, as they last said; 0 where Ray does not answer."""
    return int(_ask(registry.num_finished, 0))


def wait_reason(allocation: Allocation, registry: Any) -> str:
    """Return what the job waits for while no model worker can run; empty if nothing."""
    total, free = ray.cluster_resources(), ray.available_resources()  # type: ignore[no-untyped-call]
    workers: list[Worker] | None = _ask(registry.workers, None)  # None while it has yet to start
    has_begun = workers is None or any(worker.stage != DecodeWorker.__name__ for worker in workers)
    return describe_shortage(allocation, total, free, has_begun=has_begun)


def _ask(method: Any, default: Any, *arguments: Any) -> Any:
    """Return the answer of a method of the registry, or the default where Ray does not answer."""
    with suppress(ray.exceptions.RayError):
        return ray.get(method.remote(*arguments), timeout=_ANSWER_S)
    return default
