"""A Ray cluster of the tests' own: started once, joined by every job, ended by its pid."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bundles import save_tiny_bundle

_HEAD = """
import logging, sys, ray
from captioner.cluster.ray_private import LOCAL_RAY_SETTINGS, light_local_ray
with light_local_ray():  # a third of a small job's processor time is that of processes which serve none of these
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, **LOCAL_RAY_SETTINGS
    )
print("address", ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """The address of a running cluster of two CPUs."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # a local cluster makes a token of its own, which no other process has
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # what it would report is collected in a process of its own
    head = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _HEAD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert head.stdout is not None
    try:
        lines = iter(head.stdout.readline, "")
        found = next(match for line in lines if (match := re.match(r"address (\S+)", line)))
        yield found.group(1)
    finally:
        head.communicate()  # the end of its stdin is its sign to go


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def on_ray(ray_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of this test join the tests' cluster."""
    monkeypatch.setenv("RAY_ADDRESS", ray_address)


@pytest.fixture
def output(tmp_path: Path) -> str:
    return str(tmp_path / "captions")
