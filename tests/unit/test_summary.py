"""What the summary sets beside the figures of a run."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from captioner.config import CaptionJobConfig, ResourceConfig
from captioner.prediction import keep
from captioner.resources import Cluster, allocate
from captioner.sources import open_store
from captioner.summary import farewell, predicted
from tests.unit.test_prediction import COSTS

CLUSTER = Cluster(cpus=8, gpus=2)
ON_GPUS = allocate(ResourceConfig(), CLUSTER)
ON_CPUS = allocate(ResourceConfig(gpus_per_worker=0), CLUSTER)


@pytest.fixture
def plan(tmp_path: Path) -> Any:
    table = SimpleNamespace(store=open_store(str(tmp_path), {}), url=str(tmp_path))
    config = CaptionJobConfig(output="out")
    return SimpleNamespace(table=table, model=SimpleNamespace(fingerprint="f"), config=config)


def test_nothing_is_predicted_where_nobody_planned(plan: Any) -> None:
    assert predicted(plan, ON_GPUS, CLUSTER, 1000) is None


def test_the_prediction_is_for_the_pools_that_ran(plan: Any) -> None:
    keep(COSTS, plan.table.store, plan.table.url)
    found = predicted(plan, ON_GPUS, CLUSTER, 1000)
    assert found is not None
    assert found["seconds"] == pytest.approx(60 + 1000 / 100, rel=0.01)
    assert found["images_per_s"] == pytest.approx(1000 / found["seconds"], abs=0.01)


def test_costs_of_another_model_or_device_predict_nothing(plan: Any) -> None:
    keep(COSTS, plan.table.store, plan.table.url)
    assert predicted(plan, ON_CPUS, CLUSTER, 1000) is None
    for other in ({"fingerprint": "another"}, {"settings": "another"}):
        keep(replace(COSTS, **other), plan.table.store, plan.table.url)
        assert predicted(plan, ON_GPUS, CLUSTER, 1000) is None


def test_a_person_is_told_how_long_the_start_took(plan: Any) -> None:
    plan.table.sample = lambda _: []
    lines = list(farewell(plan, {"read": 1, "seconds": 20.5, "first_caption_s": 12.25}))
    assert lines[0] == "took      20.5 s, the first captions 12.25 s after the start"
    assert not any("first" in line for line in farewell(plan, {"read": 1, "seconds": 1, "first_caption_s": None}))


def test_a_person_is_told_what_was_predicted_beside_what_it_took(plan: Any) -> None:
    plan.table.sample = lambda _: []
    summary = {"read": 1, "seconds": 20.5, "first_caption_s": 12.25, "predicted": {"seconds": 18.2}}
    assert list(farewell(plan, summary))[1] == "planned   18.2 s, by jobs/plan.py"
    assert not any("planned" in line for line in farewell(plan, summary | {"predicted": None}))


def test_a_name_that_would_command_the_terminal_is_shown_without_its_commands(plan: Any) -> None:
    plan.table.sample = lambda _: [{"image_id": "s3://b/\x1b]0;owned\x07a\nb.jpg", "caption": "a\x1b[2Jdog"}]
    plan.config = SimpleNamespace(model=SimpleNamespace(model="m"))
    line = next(iter(farewell(plan, {"read": 1})))
    assert line.isprintable()
    assert "owned" in line
    assert "dog" in line
