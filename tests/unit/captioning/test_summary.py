"""The summary of a run: its prediction."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from captioner.captioning.costs import save_costs
from captioner.captioning.resources import Cluster, allocate
from captioner.captioning.summary import prediction_for
from captioner.config import CaptionJobConfig, ResourceConfig
from captioner.storage import Location, open_store
from tests.unit.captioning.sample_costs import COSTS

CLUSTER = Cluster(cpus=8, gpus=2)
ON_GPUS = allocate(ResourceConfig(), CLUSTER)
ON_CPUS = allocate(ResourceConfig(gpus_per_worker=0), CLUSTER)


@pytest.fixture
def plan(tmp_path: Path) -> Any:
    table = SimpleNamespace(
        store=open_store(str(tmp_path), {}),
        location=Location(str(tmp_path)),
        run_folder=Location(str(tmp_path / "_run")),
    )
    config = CaptionJobConfig(output="out")
    model = SimpleNamespace(fingerprint="f")
    return SimpleNamespace(table=table, model=model, config=config, prompts=())


def test_without_measured_costs_nothing_is_predicted(plan: Any) -> None:
    assert prediction_for(plan, ON_GPUS, CLUSTER, 1000) is None


def test_the_prediction_is_for_the_pools_that_ran(plan: Any) -> None:
    save_costs(COSTS, plan.table.store, str(plan.table.location))
    found = prediction_for(plan, ON_GPUS, CLUSTER, 1000)
    assert found is not None
    assert found["seconds"] == pytest.approx(60 + 1000 / 100, rel=0.01)
    assert found["images_per_s"] == pytest.approx(1000 / found["seconds"], abs=0.01)


def test_costs_of_another_model_or_device_predict_nothing(plan: Any) -> None:
    save_costs(COSTS, plan.table.store, str(plan.table.location))
    assert prediction_for(plan, ON_CPUS, CLUSTER, 1000) is None
    for other in ({"fingerprint": "another"}, {"settings": "another"}):
        save_costs(replace(COSTS, **other), plan.table.store, str(plan.table.location))
        assert prediction_for(plan, ON_GPUS, CLUSTER, 1000) is None
