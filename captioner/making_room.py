"""Who gives up its place when one stage has lost all of its workers and the others fill what is left of a cluster.

Ray starts the workers of a lost node anew in any order, wherever there is room. Model workers that come first may leave
none for a decoder: they wait for its rows, and it for their CPUs. Arithmetic only; knows no Ray.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass

from captioner.restarts import Start

__all__ = ["Placed", "who_yields"]


@dataclass(frozen=True, kw_only=True)
class Placed:
    """One worker of a stage, as Ray tells it."""

    actor: str
    stage: str
    is_alive: bool
    start: Start | None = None
    """The last process of a worker that is not alive; None if it has had none."""


def who_yields(workers: Sequence[Placed], nodes: Container[str]) -> Placed | None:
    """Return a worker whose place another stage needs, which has none; None if all is well or nobody can spare one.

    nodes: those that live. A worker that is alone in its stage keeps its place: else two would take turns for ever.
    """
    alive = [worker for worker in workers if worker.is_alive]
    stages_alive = {worker.stage for worker in alive}
    homeless = any(
        worker.stage not in stages_alive and worker.start is not None and worker.start.node not in nodes
        for worker in workers
    )
    spare = [worker for worker in alive if sum(other.stage == worker.stage for other in alive) > 1]
    return max(spare, key=lambda worker: worker.actor) if homeless and spare else None
