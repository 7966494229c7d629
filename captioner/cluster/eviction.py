"""Which worker makes way when one stage has lost all of its workers and the others fill what is left of the cluster.

Ray restarts the workers of a lost node in any order, wherever there is room. Model workers that restart first may leave
no CPU for a decoder: they wait for its rows, and it waits for their CPUs. Arithmetic only; knows no Ray.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass

from captioner.cluster.restarts import Start

__all__ = ["Worker", "worker_to_evict"]


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One worker of a stage: its last start, and what has become of it since."""

    id: str
    stage: str
    start: Start
    is_evicted: bool = False
    is_busy: bool = False

    def is_placed(self, living_nodes: Container[str]) -> bool:
        """Return whether it has a place to run in, as far as is known."""
        return not self.is_evicted and self.start.node in living_nodes

    def is_unplaced(self, living_nodes: Container[str]) -> bool:
        """Return whether its node is gone and no other one has started it since."""
        return not self.is_evicted and self.start.node not in living_nodes


def worker_to_evict(workers: Sequence[Worker], living_nodes: Container[str]) -> Worker | None:
    """Return a worker whose place a stage without any worker needs; None if every stage has one or none can be spared.

    A busy worker keeps its place, for the stages do not wait for each other: the one without workers may have done all
    of its work. So does a worker that is alone in its stage: otherwise two stages would evict each other for ever.
    """
    placed = [worker for worker in workers if worker.is_placed(living_nodes)]
    stages = [worker.stage for worker in placed]
    is_needed = any(worker.is_unplaced(living_nodes) and worker.stage not in stages for worker in workers)
    spare = [worker for worker in placed if not worker.is_busy and stages.count(worker.stage) > 1]
    return max(spare, key=lambda worker: worker.id) if is_needed and spare else None
