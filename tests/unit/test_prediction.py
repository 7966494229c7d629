"""What a job will take: the arithmetic, and the rehearsal that feeds it, on the demo."""

import json
import os
import shutil
import tarfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from captioner import demo, rehearsal
from captioner.config import (
    CaptionJobConfig,
    DecodingConfig,
    ImageConfig,
    InputConfig,
    PlanConfig,
    ResourceConfig,
    ScoringConfig,
)
from captioner.errors import ConfigError, InputError, OutputError
from captioner.model.image_encoder import ImageEncoder
from captioner.plan import plan_job
from captioner.prediction import (
    Costs,
    Prices,
    cpus_per_worker,
    keep,
    kept,
    predict,
    recommended_decoders,
    recommended_flags,
    settings_digest,
)
from captioner.rehearsal import rehearse
from captioner.resources import Allocation, Cluster, allocate
from captioner.sources import open_store

COSTS = Costs(
    device="cuda",
    num_images=256,
    captioned_share=1.0,
    read_s=0.0001,
    read_cpu_s=0.0001,
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
    settings=settings_digest(CaptionJobConfig(output="out")),
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


def test_costs_are_kept_beside_the_table_and_found_again(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), {})
    assert kept(store, str(tmp_path)) is None
    keep(COSTS, store, str(tmp_path))
    assert kept(store, str(tmp_path)) == COSTS


@pytest.mark.parametrize("text", ["{}", '{"device": "cu', "[1]", "\xff", '{"more": 1}', '"encode_s": "much"'])
def test_costs_that_cannot_be_read_are_none_and_said_in_a_line(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(str(tmp_path), {})
    keep(COSTS, store, str(tmp_path))
    file = tmp_path / "_run" / "plan.json"
    whole = file.read_text()
    field = text.partition(":")[0]
    is_field = field == '"encode_s"'
    file.write_text(whole.replace('"encode_s": 0.004', text) if is_field else text, encoding="latin-1")
    with caplog.at_level("INFO"):
        assert kept(store, str(tmp_path)) is None
    assert [line.startswith("plan_json=ignored reason=") for line in caplog.messages] == [True]


@pytest.mark.parametrize(
    "other",
    [
        {"decoding": DecodingConfig(num_beams=4)},
        {"decoding": DecodingConfig(max_new_tokens=7)},
        {"image": ImageConfig(fast_decode=True)},
        {"scoring": ScoringConfig(clip_score=True)},
        {"resources": ResourceConfig(slots="7")},
    ],
)
def test_what_an_image_costs_goes_by_decoding_scoring_image_and_slots(other: dict[str, Any]) -> None:
    assert settings_digest(CaptionJobConfig(output="a", **other)) != COSTS.settings
    assert settings_digest(CaptionJobConfig(output="b", resources=ResourceConfig(workers="3"))) == COSTS.settings


def rehearsed(monkeypatch: pytest.MonkeyPatch, **flags: Any) -> Mapping[str, Any]:
    monkeypatch.setattr(rehearsal, "_start_s", lambda _: 20.0)  # a real job: see tests/integration
    return rehearse(PlanConfig(sample=24, **flags))


def test_workers_that_this_machine_has_not_are_those_of_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    summary = rehearsed(monkeypatch, resources=ResourceConfig(workers="64", cpu_workers="640"))
    assert [(row["workers"], row["cpu_workers"]) for row in summary["clusters"]] == [(64, 640)]
    assert summary["here"]["workers"] == 1


def test_a_limit_holds_for_the_plan_too(monkeypatch: pytest.MonkeyPatch) -> None:
    summary = rehearsed(monkeypatch, input=InputConfig(limit=5))
    assert (summary["images"], summary["sample"]) == (5, 5)


def test_tars_that_nobody_has_counted_are_planned_by_their_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = sorted(demo.images_path().iterdir())
    for shard in range(3):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for image in images:
                tar.add(image, image.name)
    summary = rehearsed(monkeypatch, input_path=str(tmp_path), output=str(tmp_path / "out"))
    assert summary["images"] == pytest.approx(3 * len(images), abs=1)
    assert summary["is_estimate"]
    assert summary["here"]["hours"] > 0
    assert summary["read_ms"] > 0
    assert "about 7" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").rglob("*.*")] == ["plan.json"]


def test_an_input_that_a_run_has_frozen_is_not_listed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = tmp_path / "images"
    shutil.copytree(demo.images_path(), images)
    job = CaptionJobConfig(input_path=str(images), output=str(tmp_path / "out"))
    plan_job(job)
    (images / "later.png").write_bytes(b"<html>")
    assert rehearsed(monkeypatch, input_path=str(images), output=str(tmp_path / "out"))["images"] == 24


def test_a_plan_refuses_what_the_job_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--max-new-tokens is 4000"):
        rehearsed(monkeypatch, decoding=DecodingConfig(max_new_tokens=4000))
    plan_job(CaptionJobConfig(output=str(tmp_path)))
    with pytest.raises(OutputError, match="num_beams"):
        rehearsed(monkeypatch, output=str(tmp_path), decoding=DecodingConfig(num_beams=2))


def test_a_card_holds_the_model_once_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    monkeypatch.setattr(rehearsal, "_start_s", lambda _: order.append("the job of its own") or 20.0)
    load = rehearsal.CaptionWorker
    monkeypatch.setattr(rehearsal, "CaptionWorker", lambda *given: order.append("the model here") or load(*given))
    rehearse(PlanConfig(sample=1))
    assert order == ["the job of its own", "the model here"]


def test_encoding_is_timed_through_what_a_job_encodes_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "_LONG_S", 0.0)
    encode = ImageEncoder.__call__

    def slowly(encoder: ImageEncoder, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        time.sleep(0.01 * encoder.num_rows)
        return encode(encoder, pixels)

    monkeypatch.setattr(ImageEncoder, "__call__", slowly)
    assert rehearsed(monkeypatch)["encode_ms"] > 10


def test_a_slow_sample_that_leaves_slots_empty_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rehearsal, "_LONG_S", 0.0)
    with caplog.at_level("INFO"):
        rehearsed(monkeypatch, resources=ResourceConfig(slots="32"))
    [line] = [line for line in caplog.messages if line.startswith("sample=")]
    assert line.startswith("sample=24 slots=32: slots stood empty")
    assert line.endswith("give --sample 32")


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
    assert all(summary[f"{step}_ms"] > 0 for step in ("read", "fetch", "decode", "encode", "generate"))
    assert summary["here"]["bottleneck"] in ("model", "cpus", "decode", "fetch", "read")
    assert [row["workers"] for row in summary["clusters"]] == [1]  # of so few images
    allocate(ResourceConfig(**summary["recommended"]), Cluster(cpus=os.cpu_count() or 1, gpus=0), num_images)
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
