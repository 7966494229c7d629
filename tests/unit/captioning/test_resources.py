"""How a job's workers are fitted into a cluster."""

import itertools
import math

import pytest

from captioner.captioning.resources import GPU_CALLS, Allocation, Cluster, allocate, describe_shortage
from captioner.config import ResourceConfig
from captioner.errors import ResourceError


def reserved(allocation: Allocation, end: int) -> float:
    """CPUs that the whole job reserves with its pools at their smallest (0) or largest (1)."""
    tasks = allocation.num_readers * allocation.read_cpus + allocation.num_writers * allocation.write_cpus
    return tasks + allocation.workers[end] * allocation.worker_cpus + allocation.decoders[end] * allocation.decoder_cpus


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 8, 16, 96])
def test_by_default_the_whole_job_fits_a_machine_without_a_gpu(cpus: int) -> None:
    assert reserved(allocate(ResourceConfig(), Cluster(cpus=cpus, gpus=0)), end=1) <= cpus


@pytest.mark.parametrize("gpus", [0, 1, 4])
def test_a_part_can_be_written_while_others_are_read(gpus: int) -> None:
    """By the sum that Ray 2.60 does for one node: see the module's docstring."""
    for cpus in range(1, 200):
        found = allocate(ResourceConfig(), Cluster(cpus=cpus, gpus=gpus))
        pools = found.decoders[1] * found.decoder_cpus + found.workers[1] * found.worker_cpus
        asked = found.read_cpus + pools + found.write_cpus
        limit = asked + math.floor(cpus - asked + 1e-9)
        assert limit - pools - found.num_readers * found.read_cpus >= found.write_cpus - 1e-9, (cpus, found)


@pytest.mark.parametrize(("cpus", "gpus"), [(2, 1), (8, 1), (16, 2), (96, 8)])
def test_by_default_the_whole_job_fits_a_machine_with_gpus(cpus: int, gpus: int) -> None:
    allocation = allocate(ResourceConfig(), Cluster(cpus=cpus, gpus=gpus))
    assert reserved(allocation, end=1) <= cpus
    assert allocation.workers == (gpus, gpus)
    assert allocation.worker_gpus == 1
    assert allocation.worker_cpus == 0


def test_a_gpu_worker_has_enough_calls_at_once_to_keep_its_slots_full() -> None:
    of_gpu = allocate(ResourceConfig(), Cluster(cpus=8, gpus=1)).caption_calls
    assert of_gpu == GPU_CALLS > allocate(ResourceConfig(), Cluster(cpus=8, gpus=0)).caption_calls


def test_two_cores_decode_on_nearly_one_and_caption_on_one() -> None:
    allocation = allocate(ResourceConfig(), Cluster(cpus=2, gpus=0))
    assert (allocation.decoders, allocation.workers) == ((1, 1), (1, 1))
    assert allocation.decoder_cpus == pytest.approx(0.9)
    assert allocation.worker_cpus == pytest.approx(1.0)


def test_any_number_of_workers_shares_the_cpus_in_fractions() -> None:
    for workers, decoders in itertools.product((1, 2, 7), (1, 2, 5)):
        config = ResourceConfig(workers=str(workers), cpu_workers=str(decoders))
        assert reserved(allocate(config, Cluster(cpus=2, gpus=0)), end=1) <= 2


def test_a_fraction_of_a_gpu_lets_several_workers_share_it() -> None:
    allocation = allocate(ResourceConfig(gpus_per_worker=0.25), Cluster(cpus=8, gpus=1))
    assert (allocation.workers, allocation.worker_gpus) == ((4, 4), 0.25)


def test_more_gpus_than_there_are_is_an_error_that_says_the_sum() -> None:
    with pytest.raises(ResourceError, match=r"--workers 4 with 1 GPUs each need 4 GPUs; there are 2\."):
        allocate(ResourceConfig(workers="4:8"), Cluster(cpus=8, gpus=2))


def test_decoders_that_do_not_fit_beside_gpus_are_an_error_and_not_a_hang() -> None:
    with pytest.raises(ResourceError, match=r"8 decode workers need 7\.40 CPUs; there are 4"):
        allocate(ResourceConfig(cpu_workers="8"), Cluster(cpus=4, gpus=1))


@pytest.mark.parametrize(
    ("images", "cpu_workers", "decoders"),
    [(None, "auto", (8, 8)), (10**6, "auto", (8, 8)), (700, "auto", (3, 3)), (10**6, "1:4", (1, 4))],
)
def test_decoders_that_the_work_keeps_busy_start_at_once_where_nothing_grows(
    images: int | None, cpu_workers: str, decoders: tuple[int, int]
) -> None:
    allocation = allocate(ResourceConfig(cpu_workers=cpu_workers), Cluster(cpus=8, gpus=1), images)
    assert allocation.decoders == decoders
    assert reserved(allocation, end=1) <= 8
    assert allocate(ResourceConfig(), Cluster(cpus=1000, gpus=2), images).decoders[1] <= 32


def test_a_cluster_that_can_grow_may_be_asked_for_more_than_it_has() -> None:
    allocation = allocate(ResourceConfig(workers="4:8", gpus_per_worker=1), Cluster(cpus=0, gpus=0, can_grow=True))
    assert allocation.workers[1] == 8
    assert allocation.decoders == (1, 128)


def test_a_cluster_without_a_node_yet_is_planned_for_its_first_one() -> None:
    allocation = allocate(ResourceConfig(gpus_per_worker=0), Cluster(cpus=0, gpus=0, can_grow=True))
    assert allocation.decoder_cpus == pytest.approx(0.9)
    assert allocation.worker_cpus == pytest.approx(0.9)


def test_a_growing_cluster_without_a_gpu_is_refused_unless_the_job_says_what_to_wait_for() -> None:
    with pytest.raises(ResourceError, match=r"an autoscaler that may add some\. Say --gpus-per-worker 1 to wait"):
        allocate(ResourceConfig(), Cluster(cpus=4, gpus=0, can_grow=True))


@pytest.mark.parametrize(("num_images", "at_once"), [(None, 64), (10_000_000, 64), (3_000, 3), (10, 1)])
def test_all_gpu_workers_that_the_work_can_keep_busy_are_asked_for_at_once(
    num_images: int | None, at_once: int
) -> None:
    growing = Cluster(cpus=0, gpus=0, can_grow=True)
    allocation = allocate(ResourceConfig(workers="1:64", gpus_per_worker=1), growing, num_images)
    assert allocation.workers == (at_once, 64)


def test_a_cluster_that_cannot_grow_is_asked_for_no_more_than_it_has() -> None:
    allocation = allocate(ResourceConfig(workers="1:64", gpus_per_worker=0.5), Cluster(cpus=8, gpus=2), 10_000_000)
    assert allocation.workers == (4, 4)


@pytest.mark.parametrize("cluster", [Cluster(cpus=2, gpus=0), Cluster(cpus=16, gpus=0), Cluster(cpus=8, gpus=2)])
def test_a_range_that_reaches_beyond_a_fixed_cluster_ends_where_that_does(cluster: Cluster) -> None:
    allocation = allocate(ResourceConfig(workers="1:64", cpu_workers="1:27"), cluster)
    assert reserved(allocation, end=1) <= cluster.cpus
    assert allocation.worker_gpus * allocation.workers[1] <= cluster.gpus
    assert allocation.worker_gpus or allocation.worker_cpus >= 1


def test_the_decoders_of_a_fixed_cluster_go_by_the_workers_that_it_can_hold() -> None:
    assert allocate(ResourceConfig(workers="1:64"), Cluster(cpus=192, gpus=8)).decoders == (128, 128)


def test_a_growing_cluster_is_read_by_as_many_as_its_decoders_will_need() -> None:
    growing = Cluster(cpus=0, gpus=0, can_grow=True)
    assert allocate(ResourceConfig(workers="1:64", gpus_per_worker=1), growing).num_readers == 128
    few = ResourceConfig(workers="1:64", cpu_workers="1:32", gpus_per_worker=1)
    assert allocate(few, growing).num_readers == allocate(few, growing).num_writers == 4


def test_model_workers_of_a_growing_cluster_without_gpus_take_their_share_of_the_first_node() -> None:
    allocation = allocate(ResourceConfig(workers="1:64", gpus_per_worker=0), Cluster(cpus=0, gpus=0, can_grow=True))
    assert (allocation.worker_cpus, allocation.decoder_cpus) == (pytest.approx(0.9), pytest.approx(0.9))
    assert allocation.decoders == (1, 64)


def test_gpus_that_lie_on_several_nodes_are_no_place_for_one_worker() -> None:
    spread = Cluster(cpus=64, gpus=8, node_cpus=(8,) * 8, node_gpus=(1,) * 8)
    with pytest.raises(ResourceError, match=r"need 8 GPUs; there are 8, at most 1 in one node\. Lower"):
        allocate(ResourceConfig(gpus_per_worker=8), spread)
    assert allocate(ResourceConfig(gpus_per_worker=0.4), spread).workers == (16, 16)


def test_a_model_worker_on_cpus_fits_one_of_several_nodes() -> None:
    assert allocate(ResourceConfig(), Cluster(cpus=16, gpus=0)).worker_cpus == 12
    assert allocate(ResourceConfig(), Cluster(cpus=16, gpus=0, node_cpus=(4, 4, 4, 4))).worker_cpus == 3


@pytest.mark.parametrize(
    ("gpus", "free", "cpus", "has_begun", "said"),
    [
        (0, 0, 8, False, "waiting for GPUs: the cluster has 0, a worker needs 1"),
        (4, 0, 8, False, "waiting for GPUs: 0 of the cluster's 4 are free, a worker needs 1"),  # behind another job
        (4, 0, 8, True, ""),  # they are ours
        (4, 2, 8, False, ""),
        (4, 4, 0, False, "waiting for CPUs: the cluster has 0, a decoder needs 0.9"),
    ],
)
def test_a_job_says_what_it_waits_for(gpus: int, free: int, cpus: int, has_begun: bool, said: str) -> None:
    allocation = allocate(ResourceConfig(gpus_per_worker=1), Cluster(cpus=0, gpus=0, can_grow=True))
    assert describe_shortage(allocation, {"GPU": gpus, "CPU": cpus}, {"GPU": free}, has_begun=has_begun) == said
    on_cpus = allocate(ResourceConfig(gpus_per_worker=0), Cluster(cpus=8, gpus=0))
    assert describe_shortage(on_cpus, {"CPU": 8.0}, {}, has_begun=False) == ""
