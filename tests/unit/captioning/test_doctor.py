"""What `jobs/doctor.py` finds."""

import sys
from pathlib import Path
from typing import Any

import pytest

from captioner.captioning.doctor import doctor
from captioner.config import DoctorConfig, ModelConfig
from captioner.machine import memory_bytes
from tests.unit.model.tiled_llavas import save_onevision


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "AWS_ACCESS_KEY_ID"):
        monkeypatch.delenv(name, raising=False)


def says(**asked: Any) -> dict[str, tuple[bool, str]]:
    found = doctor(DoctorConfig(**asked))
    by_name = {finding["name"]: (finding["ok"], finding["says"]) for finding in found["findings"]}
    assert found["ok"] == all(is_ok for is_ok, _ in by_name.values())
    return by_name


def test_each_fact_is_a_line_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = says(input_path="demo", output=str(tmp_path / "new"), model=ModelConfig(model="demo"))
    assert {"captioner", "packages", "stores", "gpu", "memory", "cache", "temporary", "ray", "hub"} <= set(found)
    assert found["output"] == (True, f"{tmp_path}/new is new")
    assert "fingerprint=" in found["model"][1]
    assert "model worker" in found["a job here"][1]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(found) + 1
    assert lines[-1] == "nothing is in the way of a job"
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_way_is_a_problem_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/very" * 20)
    found = says(input_path=str(tmp_path / "gone"), model=ModelConfig(model=str(tmp_path / "none")))
    assert found["input"] == (False, f"{tmp_path}/gone does not exist; expected a file, a folder or prefix")
    assert found["model"][1].startswith(f"no model at '{tmp_path}/none'")
    assert found["ray"][1].endswith("is too long a name for its sockets: set RAY_TMPDIR=/tmp")
    told = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("PROBLEM ") for line in told) == 3
    assert told[-1] == "3 problems found"


def test_a_model_is_looked_at_as_a_job_is_to_ask_it(tmp_path: Path) -> None:
    folder = str(save_onevision(tmp_path))  # with a tokenizer of which no prompt is known
    found = says(model=ModelConfig(model=folder))
    assert not found["model"][0]
    assert "give the whole prompt, as --prompt" in found["model"][1]
    found = says(model=ModelConfig(model=folder, prompt="USER: {image}", dtype="float16"))
    assert found["model"][0]
    assert "template='USER: {image}'" in found["model"][1]
    assert found["a job here"][1].endswith("float16")


def test_a_cluster_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert says()["ray"] == (True, "a job joins the cluster of RAY_ADDRESS, head:6379")


def test_the_memory_is_that_of_the_container(tmp_path: Path) -> None:
    whole = memory_bytes(tmp_path)
    assert whole
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_bytes(tmp_path) == whole
    (tmp_path / "memory.max").write_text("1000000\n")
    assert memory_bytes(tmp_path) == 1_000_000


def test_no_ray_is_started() -> None:
    says()
    ray = sys.modules.get("ray")
    assert ray is None or not ray.is_initialized()
