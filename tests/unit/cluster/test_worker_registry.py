"""What the driver knows of its workers from what they told it."""

from captioner.cluster.restarts import Start
from captioner.cluster.worker_registry import WorkerRegistry

START = Start(process="1", node="n")


def test_a_worker_finds_its_last_start_and_a_new_one_finds_none() -> None:
    registry = WorkerRegistry()
    assert registry.last_start("a") is None
    registry.note_start("a", "DecodeWorker", START, {})
    assert registry.last_start("a") == START


def test_an_evicted_worker_has_no_place_until_it_starts_again() -> None:
    registry = WorkerRegistry()
    registry.note_start("a", "DecodeWorker", START, {})
    registry.note_eviction("a")
    [evicted] = registry.workers()
    assert not evicted.is_placed({"n"})
    registry.note_start("a", "DecodeWorker", START, {})
    [placed] = registry.workers()
    assert placed.is_placed({"n"})


def test_handles_are_kept_only_where_workers_are_evicted() -> None:
    keeping, other = WorkerRegistry(may_evict=True), WorkerRegistry()
    for registry in (keeping, other):
        registry.note_start("a", "DecodeWorker", START, {"a": "handle"})
    assert (keeping.handle("a"), other.handle("a")) == ("handle", None)


def test_a_worker_is_busy_from_its_first_call_to_its_last() -> None:
    registry = WorkerRegistry(may_evict=True)
    assert registry.note_start("a", "DecodeWorker", START, {})
    registry.note_busy("a", True)
    assert [worker.is_busy for worker in registry.workers()] == [True]
    registry.note_start("a", "DecodeWorker", START, {})  # killed amid its calls, and started again
    assert [worker.is_busy for worker in registry.workers()] == [False]
