"""A stage that has lost all of its workers gets the place of an idle worker of another one; it restarts elsewhere."""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import cloudpickle

import captioner.cluster.supervision
from captioner.captioning.resources import Cluster, allocate
from captioner.cluster.eviction import Worker, worker_to_evict
from captioner.cluster.restarts import Start
from captioner.cluster.session import joined_cluster
from captioner.cluster.supervision import supervised, supervision
from captioner.config import ResourceConfig
from tests.integration.clusters import wait_until

pytestmark = [
    pytest.mark.usefixtures("on_ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of Ray's own sockets, when a driver leaves its cluster
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),  # Ray Data copies its own deprecated settings
]
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import what is here

TWO_NODES = Cluster(cpus=4, gpus=0, node_cpus=(2, 2))


class Waiting:
    """A worker of which each call ends once there is a file; returns the pid of its process."""

    def __call__(self, file: Path) -> int:
        while not file.exists():
            time.sleep(0.02)
        return os.getpid()


@pytest.mark.slow
def test_an_idle_worker_is_restarted_for_a_stage_that_has_none_and_a_busy_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocation = replace(allocate(ResourceConfig(), TWO_NODES), worker_cpus=1.0)
    looks, now, later = [], tmp_path, tmp_path / "later"

    def counted(*arguments: Any) -> Worker | None:
        looks.append(worker_to_evict(*arguments))
        return looks[-1]

    monkeypatch.setattr(captioner.cluster.supervision, "worker_to_evict", counted)
    with joined_cluster(), supervision(allocation, TWO_NODES, evict_every_s=0.5) as registry:
        stage = ray.remote(supervised(Waiting)).options(num_cpus=0, max_restarts=-1, max_task_retries=-1)
        workers = [stage.remote(registry=registry) for _ in range(2)]
        before = ray.get([worker.__call__.remote(now) for worker in workers])
        busy = [worker.__call__.remote(later) for worker in workers]

        def noted() -> list[Worker]:
            return list(ray.get(registry.workers.remote()))

        def pids() -> list[int]:
            return list(ray.get([worker.__call__.remote(now) for worker in workers]))

        wait_until(lambda: sum(worker.is_busy for worker in noted()) == 2)
        lost = Start(process="1", node="a node that is gone")
        ray.get(registry.note_start.remote("lost", "Decoding", lost, {}))
        num_looks = len(looks)
        wait_until(lambda: len(looks) > num_looks + 3)  # one may have begun before; two in a row evict
        later.touch()
        assert ray.get(busy) == before, "both were busy"

        wait_until(lambda: pids() != before)
        assert len(set(before) & set(pids())) == 1, "one of the two has another process"
        wait_until(lambda: not any(worker.is_evicted for worker in noted()))
