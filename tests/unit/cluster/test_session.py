"""What a session finds in a cluster, what it refuses, and that it leaves this process as it was."""

import os
import signal
from typing import Any
from unittest.mock import Mock

import pytest

from captioner.captioning.resources import Cluster, allocate
from captioner.cluster.pools import check_device
from captioner.cluster.session import cluster_of, joined_cluster
from captioner.config import ResourceConfig
from captioner.errors import ConfigError, JobError, ResourceError
from tests.process_state import process_state


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("", "no local Ray could be started: timed out during startup; expected a machine with CPU and memory"),
        ("127.0.0.1:1", "the cluster of RAY_ADDRESS, 127.0.0.1:1, was not joined: timed out .*; expected a head"),
    ],
)
def test_a_ray_that_does_not_start_is_an_error_of_ours_that_says_what_was_tried(
    monkeypatch: pytest.MonkeyPatch, address: str, expected: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.init", Mock(side_effect=Exception("timed out\nduring startup")))
    with pytest.raises(JobError, match=expected), joined_cluster():
        pass


def test_a_temporary_folder_whose_name_is_too_long_for_a_socket_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", "/long/" * 20)
    monkeypatch.setattr("ray.init", Mock(side_effect=OSError("AF_UNIX path length cannot exceed 107 bytes: '/long'")))
    text = "Ray puts its sockets below (/long/)+, .*; expected a shorter folder for temporary files: TMPDIR=/tmp"
    with pytest.raises(ResourceError, match=text), joined_cluster():
        pass


def test_a_device_that_no_worker_gets_is_refused_before_a_worker_starts() -> None:
    without = allocate(ResourceConfig(), Cluster(cpus=2, gpus=0))
    with pytest.raises(ConfigError, match="--device is cuda:0, but the workers get no GPU"):
        check_device("cuda:0", without)
    check_device("cuda", allocate(ResourceConfig(), Cluster(cpus=2, gpus=1)))
    check_device("auto", without)


def test_the_cpus_of_gpu_nodes_do_not_decode_and_dead_nodes_have_nothing() -> None:
    def node(stage: str, *, alive: bool = True, **resources: float) -> dict[str, Any]:
        return {"Alive": alive, "Labels": {"captioner-stage": stage}, "Resources": resources}

    nodes = [node("decode", CPU=32.0), node("model", CPU=16.0, GPU=1.0), node("model", alive=False, GPU=8.0)]
    found = cluster_of([*nodes, {"Alive": True, "Labels": {}, "Resources": {"CPU": 4.0, "GPU": 2.0}}], can_grow=False)
    assert found == Cluster(cpus=36, gpus=3, node_cpus=(32, 4), node_gpus=(1, 2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # Ray Data copies its own deprecated settings
def test_a_session_that_fails_leaves_the_process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def fail(**_: object) -> None:
        os.environ["RAY_AUTH_MODE"] = "token"  # as a local Ray does
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise RuntimeError("timed out")

    monkeypatch.setattr("ray.init", fail)
    before = process_state()
    with pytest.raises(JobError), joined_cluster():
        pass
    assert process_state() == before
