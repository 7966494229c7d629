"""A job leaves the process that runs it as it was."""

import os
from pathlib import Path

import pytest
import ray

from captioner.cluster.caption_pipeline import caption_images
from captioner.cluster.session import joined_cluster
from captioner.config import CaptionJobConfig, DecodingConfig, ModelConfig
from tests.process_state import process_state
from tests.sample_images import encoded

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of Ray's own sockets, when a driver leaves its cluster
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),  # Ray Data copies its own deprecated settings
]


@pytest.mark.slow
@pytest.mark.parametrize("is_local", [True, False])
def test_a_job_leaves_the_process_as_it_was(
    is_local: bool, ray_address: str, tmp_path: Path, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "" if is_local else ray_address)
    (tmp_path / "image.jpg").write_bytes(encoded(seed=1))
    config = CaptionJobConfig(
        input_path=str(tmp_path / "image.jpg"),
        output=str(tmp_path / "out"),
        model=ModelConfig(model=bundle),
        decoding=DecodingConfig(max_new_tokens=2),
    )
    before = process_state()
    caption_images(config)
    assert process_state() == before


@pytest.mark.slow
def test_a_local_ray_waits_without_spinning_and_has_the_priority_of_its_job_unless_the_user_has_it_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("RAY_worker_niceness", raising=False)
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1")
    with joined_cluster():
        found, niceness = ray.get(ray.remote(lambda: (dict(os.environ), os.nice(0))).remote())
    assert niceness == os.nice(0)
    assert found["OMP_WAIT_POLICY"] == "PASSIVE"
    assert found["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] == "1"
