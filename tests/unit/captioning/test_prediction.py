"""What a job will take, from the costs of one image: arithmetic."""

from dataclasses import replace

import pytest

from captioner.captioning.prediction import Prices, cpus_per_worker, predict, recommended_decoders, recommended_flags
from captioner.captioning.resources import Allocation, Cluster, allocate
from captioner.config import ResourceConfig
from tests.unit.captioning.sample_costs import COSTS


def pools(workers: int, decoders: int) -> Allocation:
    config = ResourceConfig(workers=str(workers), cpu_workers=str(decoders), gpus_per_worker=1)
    return allocate(config, Cluster(cpus=10 * decoders, gpus=workers))


def test_the_slowest_pool_decides() -> None:
    few = predict(COSTS, pools(2, 1), None, shared_cpus=None)
    assert (few.bottleneck, few.images_per_s) == ("decode", pytest.approx(50))
    enough = predict(COSTS, pools(2, 4), None, shared_cpus=None)
    assert (enough.bottleneck, enough.images_per_s) == ("model", pytest.approx(100))
    assert enough.tokens_per_s == pytest.approx(3000)


def test_a_slow_store_is_told_from_slow_decoding() -> None:
    slow = replace(COSTS, fetch_s=0.1)
    assert predict(slow, pools(2, 1), None, shared_cpus=None).bottleneck == "fetch"


def test_tars_that_too_few_tasks_read_are_the_bottleneck() -> None:
    slow = replace(COSTS, read_s=0.1)
    found = predict(slow, pools(8, 16), None, shared_cpus=None)
    assert (found.bottleneck, found.images_per_s) == ("read", pytest.approx(pools(8, 16).num_readers / 0.1))


def test_cpus_that_all_steps_share_are_a_limit_of_their_own() -> None:
    on_cpu = replace(COSTS, device="cpu")
    allocation = allocate(ResourceConfig(), Cluster(cpus=2, gpus=0))
    found = predict(on_cpu, allocation, None, shared_cpus=1.0)
    assert found.bottleneck == "cpus"
    assert found.images_per_s < 1 / (on_cpu.decode_s + on_cpu.model_s)


def test_images_that_cannot_be_decoded_cost_no_model() -> None:
    half = replace(COSTS, captioned_share=0.5)
    found = predict(half, pools(1, 100), None, shared_cpus=None)
    assert found.images_per_s == pytest.approx(100)
    assert found.tokens_per_s == pytest.approx(1500)


def test_the_time_is_the_start_and_the_work_and_unknown_for_an_unknown_input() -> None:
    assert predict(COSTS, pools(1, 4), 1000, shared_cpus=None).seconds == pytest.approx(60 + 20)
    assert predict(COSTS, pools(1, 4), None, shared_cpus=None).seconds is None


def test_a_million_images_cost_what_the_hours_of_all_cards_and_cores_cost() -> None:
    prices = Prices(gpu=3.6, cpu=0.0)
    assert predict(COSTS, pools(2, 4), None, shared_cpus=None, prices=prices).price_per_million == pytest.approx(20)
    assert predict(COSTS, pools(2, 4), None, shared_cpus=None).price_per_million is None


def test_the_recommended_decoders_are_never_the_bottleneck() -> None:
    for num_workers in (1, 8, 64):
        allocation = pools(num_workers, recommended_decoders(COSTS, num_workers))
        assert predict(COSTS, allocation, None, shared_cpus=None).bottleneck == "model"
    assert cpus_per_worker(COSTS) > 1


def test_a_cluster_that_cannot_grow_is_predicted_for_what_it_can_hold() -> None:
    allocation = allocate(ResourceConfig(workers="1:64", gpus_per_worker=1), Cluster(cpus=80, gpus=2), 10**6)
    assert predict(COSTS, allocation, 10**6, shared_cpus=80).images_per_s == pytest.approx(100)


def test_workers_that_have_nothing_to_do_are_not_counted() -> None:
    allocation = allocate(
        ResourceConfig(workers="1:64", gpus_per_worker=1), Cluster(cpus=0, gpus=0, can_grow=True), 3000
    )
    assert predict(COSTS, allocation, 3000, shared_cpus=None).images_per_s == pytest.approx(150)


@pytest.mark.parametrize("num_images", [24, 3_000, 10_000_000, None])
@pytest.mark.parametrize("here", [Cluster(cpus=2, gpus=0), Cluster(cpus=64, gpus=0), Cluster(cpus=16, gpus=1)])
def test_a_job_takes_the_flags_that_are_recommended_on_the_machine_that_was_measured(
    here: Cluster, num_images: int | None
) -> None:
    allocation = allocate(ResourceConfig(), here, num_images)
    costs = replace(COSTS, device="cuda" if here.gpus else "cpu")
    flags = recommended_flags(costs, allocation, num_images)
    found = allocate(ResourceConfig(**{**flags, "gpus_per_worker": allocation.worker_gpus}), here, num_images)
    assert found.workers == allocation.workers
    assert found.worker_cpus >= allocation.worker_cpus
    assert flags["workers"] == ("1" if not here.gpus else {24: "1", 3_000: "1:3"}.get(num_images or 0, "1:64"))
