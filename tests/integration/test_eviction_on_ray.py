"""A stage that has lost all of its workers gets the place of an idle worker of another one; it restarts elsewhere."""

import os
import sys
import time
from dataclasses import replace

import pytest
import ray
from ray import cloudpickle

from captioner.captioning.resources import Cluster, allocate
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


class Sleeping:
    """A worker of which each call takes as long as it is told; returns the pid of its process."""

    def __call__(self, seconds: float) -> int:
        time.sleep(seconds)
        return os.getpid()


@pytest.mark.slow
def test_an_idle_worker_is_restarted_for_a_stage_that_has_none_and_a_busy_one_is_not() -> None:
    allocation = replace(allocate(ResourceConfig(), TWO_NODES), worker_cpus=1.0)
    with joined_cluster(), supervision(allocation, TWO_NODES, evict_every_s=0.5) as registry:
        stage = ray.remote(supervised(Sleeping)).options(num_cpus=0, max_restarts=-1, max_task_retries=-1)
        workers = [stage.remote(registry=registry) for _ in range(2)]
        before = ray.get([worker.__call__.remote(0) for worker in workers])
        busy = [worker.__call__.remote(4) for worker in workers]
        lost = Start(process="1", node="a node that is gone")
        ray.get(registry.note_start.remote("lost", "Decoding", lost, {}))
        assert ray.get(busy) == before, "both were busy"

        def num_evicted() -> int:
            return sum(worker.is_evicted for worker in ray.get(registry.workers.remote()))

        after = before
        give_up = time.monotonic() + 200
        while after == before and time.monotonic() < give_up:
            time.sleep(0.5)
            after = ray.get([worker.__call__.remote(0) for worker in workers])
        assert len(set(before) & set(after)) == 1, "one of the two has another process"
        wait_until(lambda: num_evicted() == 0)
