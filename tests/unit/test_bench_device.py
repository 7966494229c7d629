"""The benchmark of a card at toy size on the CPU, so that it runs when there is a card."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.bench.device.__main__ import measure
from tests.bench.device.parts import TARGETS, _union, parts
from tests.bench.device.rig import Rig


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """At toy size threads only wait for each other: 500 ms a step on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Rig(torch.device("cpu"), is_tiny=True, rounds=1)
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
def test_every_part_of_the_device_benchmark_runs_without_a_card(rig: Rig) -> None:
    report = measure(rig)
    assert list(report["parts"]) == list(parts(rig))
    figures = [value for part in report["parts"].values() for value in part.values() if isinstance(value, float)]
    assert len(figures) > 30
    assert all(value > 0 for value in figures)
    assert report["parts"]["equality"]["same"] >= 98
    assert report["parts"]["bundle"]["captioned"] == 64


def test_a_report_names_its_machine_and_judges_its_figures_and_is_kept_after_each_part(
    rig: Rig, tmp_path: Path
) -> None:
    report = measure(rig, only="step_recorded_128,clip", out=tmp_path / "figures.json")
    assert set(report["parts"]) == {"step_recorded_128", "clip"}
    assert report["parts"]["step_recorded_128"]["targets"] == {"ms": 5.7}
    assert set(report["parts"]["step_recorded_128"]["met"]) == {"ms"}
    assert {"date", "device", "driver", "torch", "transformers", "dollars_an_hour"} <= set(report)
    assert json.loads((tmp_path / "figures.json").read_text()) == report


def test_every_target_is_of_a_part(rig: Rig) -> None:
    assert {part for part, _ in TARGETS} <= set(parts(rig))


def test_time_in_which_two_kernels_run_counts_once() -> None:
    assert _union([(5, 7), (0, 3), (1, 2), (2, 4), (6, 9)]) == 8
