"""What a job will take: the arithmetic, and the rehearsal that feeds it, on the demo."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from captioner import demo, rehearsal
from captioner.config import PlanConfig, ResourceConfig
from captioner.errors import ConfigError, InputError
from captioner.prediction import Costs, Prices, cpus_per_worker, keep, kept, predict, recommended_decoders
from captioner.rehearsal import rehearse
from captioner.resources import Allocation, Cluster, allocate
from captioner.sources import open_store

COSTS = Costs(
    device="cuda",
    num_images=256,
    captioned_share=1.0,
    fetch_s=0.004,
    fetch_cpu_s=0.001,
    decode_s=0.020,
    encode_s=0.004,
    generate_s=0.016,
    tokens_per_image=30.0,
    slots=256,
    model_threads=1,
    start_s=60.0,
    fingerprint="f",
)


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


def test_costs_are_kept_beside_the_table_and_found_again(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), {})
    assert kept(store, str(tmp_path)) is None
    keep(COSTS, store, str(tmp_path))
    assert kept(store, str(tmp_path)) == COSTS


def test_a_rehearsal_measures_every_step_and_writes_only_its_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "_start_s", lambda _: 20.0)  # a real job: see tests/integration
    images = tmp_path / "images"
    shutil.copytree(demo.images_path(), images)
    (images / "broken.png").write_bytes(b"<html>")
    config = PlanConfig(input_path=str(images), output=str(tmp_path / "out"), sample=64, cpu_hourly=0.04)
    summary = rehearse(config)
    num_images = len(list(images.iterdir()))
    assert (summary["images"], summary["sample"], summary["device"]) == (num_images, num_images, "cpu")
    assert all(summary[f"{step}_ms"] > 0 for step in ("fetch", "decode", "encode", "generate"))
    assert summary["here"]["bottleneck"] in ("model", "cpus", "decode", "fetch")
    assert [row["workers"] for row in summary["clusters"]] == [1, 8, 64]
    assert summary["clusters"][0]["price_per_million"] > 0
    assert json.dumps(summary)
    assert [path.name for path in (tmp_path / "out").rglob("*.*")] == ["plan.json"]
    assert "this machine" in capsys.readouterr().err


def test_a_rehearsal_without_one_good_image_says_why(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"<html>")
    with pytest.raises(InputError, match=r"none of 1 images .* can be captioned: not_an_image"):
        rehearse(PlanConfig(input_path=str(tmp_path)))


def test_a_price_below_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--gpu-hourly is -1; expected 0 or more"):
        PlanConfig(gpu_hourly=-1)
