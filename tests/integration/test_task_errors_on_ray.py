"""Of a task that Ray tried again and that succeeded then, no error ends a job later in place of the true one."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import ray
from ray import cloudpickle

from captioner.captioning.resources import Cluster, allocate
from captioner.cluster.session import joined_cluster
from captioner.cluster.sources_and_sinks import ReadSlices
from captioner.cluster.supervision import supervision
from captioner.config import ResourceConfig
from captioner.inputs import Unit
from captioner.inputs.slices import Slice

pytestmark = [
    pytest.mark.usefixtures("on_ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of Ray's own sockets, when a driver leaves its cluster
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),  # Ray Data copies its own deprecated settings
]
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import what is here

ONE_NODE = Cluster(cpus=2, gpus=0, node_cpus=(2,))
UNIT = Unit(ordinal=0, kind="files", path="", name="", num_rows=1, size_bytes=None)


class FailingAtFirst:
    """A reader that fails in the middle of its first read, and no more once its file is there."""

    def __init__(self, tries: Path) -> None:
        self.tries = tries

    def read(self, piece: Slice) -> Iterator[pa.Table]:
        yield pa.table({"key": [piece.start]})
        if not self.tries.exists():
            self.tries.touch()
            raise OSError("the network is gone")


def test_the_error_of_a_task_that_succeeded_at_its_next_try_is_void(tmp_path: Path) -> None:
    allocation = replace(allocate(ResourceConfig(), ONE_NODE), worker_cpus=1.0)
    with joined_cluster(), supervision(allocation, ONE_NODE) as registry:
        source = ReadSlices(FailingAtFirst(tmp_path / "tried"), [Slice(unit=UNIT, stop=1, attempts={})], registry)
        [task] = source.get_read_tasks(1)

        def read() -> int:
            return sum(block.num_rows for block in task())

        assert ray.get(ray.remote(read).options(max_retries=1, retry_exceptions=True).remote()) == 1
        assert (tmp_path / "tried").exists(), "it failed at first"
        assert ray.get(registry.error.remote()) is None
