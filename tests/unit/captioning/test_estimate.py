"""A sample of the demo is captioned and timed here; a job's start is timed in tests/integration."""

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

from captioner import demo
from captioner.captioning.captioner import Captioner
from captioner.captioning.estimate import estimate_job
from captioner.captioning.measurement import PromptCost, _added_by, _ModelTime
from captioner.captioning.plan import plan_job
from captioner.captioning.resources import Cluster, allocate
from captioner.config import CaptionJobConfig, DecodingConfig, InputConfig, ModelConfig, PlanConfig, ResourceConfig
from captioner.errors import ConfigError, InputError, OutputError
from captioner.model.image_encoder import ImageEncoder
from tests.job_in_process import run_job

START_S = 20.0
DEMO = ModelConfig(model="demo")


def estimated(slow_sample_s: float = 0.0, sample: int = 24, **flags: Any) -> Mapping[str, Any]:
    """Return an estimate; by default its sample is captioned once only, however quick it is."""
    config = PlanConfig(sample=sample, **{"model": DEMO} | flags)
    return estimate_job(config, measure_start=lambda _: START_S, slow_sample_s=slow_sample_s)


def test_workers_beyond_this_machine_are_predicted_for_a_cluster() -> None:
    summary = estimated(resources=ResourceConfig(workers="64", cpu_workers="640"))
    assert [(row["workers"], row["cpu_workers"]) for row in summary["clusters"]] == [(64, 640)]
    assert summary["here"]["workers"] == 1


def test_a_limit_holds_for_the_plan_too() -> None:
    summary = estimated(input=InputConfig(limit=5))
    assert (summary["images"], summary["sample"]) == (5, 5)


def test_tars_that_are_not_counted_yet_are_estimated_by_their_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = sorted(demo.images_path().iterdir())
    (tmp_path / "shards").mkdir()
    for shard in range(3):
        with tarfile.open(tmp_path / "shards" / f"{shard}.tar", "w") as tar:
            for image in images:
                tar.add(image, image.name)
    summary = estimated(input_path=str(tmp_path / "shards"), output=str(tmp_path / "out"))
    assert summary["images"] == pytest.approx(3 * len(images), abs=1)
    assert summary["is_estimate"]
    assert summary["here"]["hours"] > 0
    assert summary["read_ms"] > 0
    assert "about 7" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").rglob("*.*")] == ["plan.json"]


def test_an_input_that_a_run_has_frozen_is_not_listed_again(tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(demo.images_path(), images)
    job = CaptionJobConfig(input_path=str(images), output=str(tmp_path / "out"), model=DEMO)
    plan_job(job)
    (images / "later.png").write_bytes(b"<html>")
    assert estimated(input_path=str(images), output=str(tmp_path / "out"))["images"] == 24


def test_a_plan_refuses_what_the_job_would(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--max-new-tokens is 4000"):
        estimated(decoding=DecodingConfig(max_new_tokens=4000))
    plan_job(CaptionJobConfig(output=str(tmp_path)))
    with pytest.raises(OutputError, match="num_beams"):
        estimated(output=str(tmp_path), decoding=DecodingConfig(num_beams=2))


def test_a_gpu_holds_the_model_once_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    load = Captioner.from_bundle
    monkeypatch.setattr(Captioner, "from_bundle", lambda *args, **kwargs: order.append("here") or load(*args, **kwargs))
    estimate_job(
        PlanConfig(sample=1), measure_start=lambda _: order.append("the job of its own") or START_S, slow_sample_s=0.0
    )
    assert order == ["the job of its own", "here"]


def test_encoding_is_timed_through_what_a_job_encodes_with(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = ImageEncoder.encode_squares

    def slowly(encoder: ImageEncoder, pixels: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01 * encoder.num_rows)
        return encode(encoder, pixels)

    monkeypatch.setattr(ImageEncoder, "encode_squares", slowly)
    assert estimated()["encode_ms"] > 10


def test_a_slow_sample_that_leaves_slots_empty_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        estimated(resources=ResourceConfig(slots="32"))
    [line] = [line for line in caplog.messages if line.startswith("sample=")]
    assert line.startswith("sample=24 slots=32: slots stood empty")
    assert line.endswith("give --sample 32")


def test_an_estimate_measures_every_step_and_writes_only_its_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    shutil.copytree(demo.images_path(), images)
    (images / "broken.png").write_bytes(b"<html>")
    summary = estimated(10.0, sample=64, input_path=str(images), output=str(tmp_path / "out"), cpu_hourly=0.04)
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


def test_an_estimate_without_one_good_image_says_why(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"<html>")
    with pytest.raises(InputError, match=r"none of 1 images .* can be captioned: not_an_image"):
        estimate_job(PlanConfig(input_path=str(tmp_path), model=DEMO))


def test_a_negative_price_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--gpu-hourly is -1; expected 0 or more"):
        PlanConfig(gpu_hourly=-1)


def test_each_of_several_prompts_is_priced_by_what_it_adds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("caption: Describe it.\nshort: {text: Name it., max_new_tokens: 1}\nwords: {text: Tell.}")
    summary = estimated(prompts=str(prompts), cpu_hourly=0.04)
    priced = summary["prompts"]
    assert list(priced) == ["caption", "short", "words"]
    assert priced["short"]["tokens_per_image"] == 1
    assert sum(one["tokens_per_image"] for one in priced.values()) == pytest.approx(
        summary["tokens_per_image"], abs=0.2
    )
    assert all(0 <= one["generate_ms"] <= summary["generate_ms"] + summary["encode_ms"] for one in priced.values())
    assert all(0 <= one["price_per_million"] <= summary["here"]["price_per_million"] for one in priced.values())
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  of these short ")]
    assert told[0].endswith(f" ms, 1 tokens, {priced['short']['price_per_million']:.2f} per million")


def test_a_prompt_that_is_added_alone_is_measured_alone(tmp_path: Path) -> None:
    job = CaptionJobConfig(
        input_path="demo", output=str(tmp_path / "out"), model=DEMO, decoding=DecodingConfig(max_new_tokens=4)
    )
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("caption: Describe it.")
    run_job(replace(job, prompts=str(prompts)), "run-1")
    prompts.write_text("caption: Describe it.\nshort: {text: Name it., max_new_tokens: 1}")
    summary = estimated(
        input_path="demo", output=job.output, prompts=str(prompts), decoding=DecodingConfig(max_new_tokens=4)
    )
    assert (summary["images"], summary["tokens_per_image"]) == (24, 1)
    assert "prompts" not in summary


def test_more_or_less_work_shows_in_what_a_prompt_adds() -> None:
    whole, without = _ModelTime(2.0, 4.0, 30.0), _ModelTime(9.0, 3.0, 20.0)
    assert _added_by(whole, without) == PromptCost(0.5, 10.0), "a quarter of the work, however long the clock ran"
    assert _added_by(whole, without._replace(work_s=5.0)).model_s == 0
