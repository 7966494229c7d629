"""Which worker makes way for a stage that has lost all of its workers."""

import pytest

from captioner.cluster.eviction import Worker, worker_to_evict
from captioner.cluster.restarts import Start

NODES = {"here", "there"}


def model(worker_id: str, *, node: str = "here", is_evicted: bool = False, is_busy: bool = False) -> Worker:
    start = Start(process="1", node=node)
    return Worker(id=worker_id, stage="model", start=start, is_evicted=is_evicted, is_busy=is_busy)


def decoder(worker_id: str = "d", *, node: str = "gone") -> Worker:
    return Worker(id=worker_id, stage="decoder", start=Start(process="2", node=node))


def test_one_of_two_model_workers_is_evicted_for_the_only_decoder() -> None:
    evicted = worker_to_evict([model("a"), model("b"), decoder()], NODES)
    assert evicted is not None
    assert evicted.id == "b"


@pytest.mark.parametrize(
    "workers",
    [
        [model("a"), model("b"), decoder(), decoder("e", node="here")],  # the other decoder works
        [model("a"), model("b"), decoder(node="there")],  # it has found a place and is loading
        [model("a"), model("b")],  # the job begins
        [model("a"), model("b", is_evicted=True), decoder()],  # one model worker is left
        [model("a"), model("b", node="gone"), decoder()],
        [model("a", is_busy=True), model("b", is_busy=True), decoder()],  # which may have decoded all there was
        [decoder()],
        [],
    ],
)
def test_no_worker_is_evicted_where_that_helps_no_stage(workers: list[Worker]) -> None:
    assert worker_to_evict(workers, NODES) is None


def test_an_evicted_worker_does_not_get_its_place_back() -> None:
    evicted = model("b", is_evicted=True)
    assert worker_to_evict([model("a"), evicted, decoder(node="here")], NODES) is None
    assert worker_to_evict([evicted, decoder(node="here"), decoder("e", node="here")], NODES) is None
