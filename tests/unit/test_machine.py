"""How many CPUs a process counts on."""

import os
from pathlib import Path

import pytest

from captioner.machine import num_cpus


@pytest.mark.parametrize(("quota", "expected"), [("100000 100000", 1), ("50000 100000", 1), ("max 100000", None)])
def test_a_pod_has_the_cpus_of_its_limit_and_not_of_its_node(quota: str, expected: int | None, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(quota + "\n")
    assert num_cpus(tmp_path) == (expected or len(os.sched_getaffinity(0)))


def test_the_first_version_of_control_groups_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("100000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert num_cpus(tmp_path) == 1
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert num_cpus(tmp_path) == len(os.sched_getaffinity(0))


def test_a_machine_without_control_groups_has_what_the_process_may_run_on(tmp_path: Path) -> None:
    assert num_cpus(tmp_path) == len(os.sched_getaffinity(0))
