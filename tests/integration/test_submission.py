"""A job that is submitted to a real job server, twice: its log, its exit code, its metrics."""

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from captioner.captioning.telemetry import METRICS
from captioner.config import VerifyConfig
from captioner.tables.verification import verify
from tests.bundles import save_tiny_bundle
from tests.conftest import S3Server
from tests.integration.clusters import LocalCluster, job_server
from tests.sample_images import encoded

pytest.importorskip("aiohttp_cors", reason="the job server needs pip install -c constraints.txt '.[cluster]'")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NUM_IMAGES = 400


@dataclass
class Submissions:
    """Two submissions of one job, one of a job that cannot run, and one of the plan of the first."""

    url: str
    first: "subprocess.CompletedProcess[str]"
    second: "subprocess.CompletedProcess[str]"
    wrong: "subprocess.CompletedProcess[str]"
    plan: "subprocess.CompletedProcess[str]"
    metrics: set[str] = field(default_factory=set)


@pytest.fixture(scope="module")
def submissions(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Submissions]:
    import fsspec

    fs = fsspec.filesystem("s3", **s3_server.storage_options, use_listings_cache=False)
    fs.call_s3("create_bucket", Bucket="submitted")
    fs.pipe({f"submitted/in/{seed:04d}.jpg": encoded(seed=seed) for seed in range(NUM_IMAGES)})
    fs.pipe_file("submitted/in/-broken.jpg", b"<html>")  # the first of all, whose failure is counted soon
    bundle = save_tiny_bundle(tmp_path_factory.mktemp("bundle"))
    fs.put(bundle, "submitted/bundle", recursive=True)
    environment = {**s3_server.environment, "CAPTIONER_CACHE": str(tmp_path_factory.mktemp("cache"))}
    with job_server(environment) as (cluster, address):
        command = ["s3://submitted/in", "s3://submitted/out", "--model", "s3://submitted/bundle"]
        flags = ["--workers", "1:64", "--max-new-tokens", "16"]
        with _scraped(cluster) as metrics:  # until long after the first has ended: its last figures come late
            submissions = Submissions(
                "s3://submitted/out",
                submit(address, [*command, *flags]),
                submit(address, [*command, *flags]),
                submit(address, [*command, "--max-new-tokens", "0"]),
                submit(address, ["s3://submitted/in", *command[2:], "--sample", "32"], job="plan.py"),
                metrics,
            )
        yield submissions


def submit(address: str, arguments: list[str], job: str = "caption.py") -> "subprocess.CompletedProcess[str]":
    """The README's command."""
    ray = [sys.executable, "-W", "ignore", "-m", "ray.scripts.scripts"]
    command = ["job", "submit", "--address", address, "--working-dir", ".", "--", "python", f"jobs/{job}"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.run(
        [*ray, *command, *arguments],
        cwd=ROOT,
        env={**environment, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        check=False,
    )


class _scraped:  # noqa: N801
    """Names of our metrics that the node serves to Prometheus while the block runs."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self._seen: set[str] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._scrape, daemon=True)

    def __enter__(self) -> set[str]:
        self._thread.start()
        return self._seen

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _scrape(self) -> None:
        [node] = self._cluster.nodes()
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        while not self._ended.wait(0.5):
            try:
                with urllib.request.urlopen(url, timeout=5) as answer:
                    self._seen |= set(re.findall(r"^(ray_captioner_\w+)", answer.read().decode(), re.MULTILINE))
            except OSError:  # not up yet
                time.sleep(0.5)


def summary_of(done: "subprocess.CompletedProcess[str]") -> dict[str, object]:
    [line] = [line for line in done.stdout.splitlines() if line.startswith('{"ok"')]
    found: dict[str, object] = json.loads(line)
    return found


def test_a_submitted_job_captions_a_bucket_and_ends_well(submissions: Submissions, s3_server: S3Server) -> None:
    assert submissions.first.returncode == 0, submissions.first.stdout + submissions.first.stderr
    found = summary_of(submissions.first)
    assert (found["captioned"], found["failed_by_reason"]) == (NUM_IMAGES, {"not_an_image": 1})
    assert verify(VerifyConfig(table=submissions.url, storage_options=s3_server.storage_options))["ok"]


def test_the_log_of_a_submission_has_lines_and_no_bar(submissions: Submissions) -> None:
    assert "captioner workers=" in submissions.first.stdout
    assert "\r" not in submissions.first.stdout
    assert "image/s" not in submissions.first.stdout


def test_a_job_that_is_submitted_again_continues(submissions: Submissions) -> None:
    assert submissions.second.returncode == 0, submissions.second.stdout
    found = summary_of(submissions.second)
    assert (found["read"], found["skipped_done"]) == (0, NUM_IMAGES + 1)


def test_a_job_that_cannot_run_makes_the_submission_fail_with_its_words(submissions: Submissions) -> None:
    assert submissions.wrong.returncode != 0
    assert "error: --max-new-tokens is 0; expected at least 1" in submissions.wrong.stdout


def test_prometheus_gets_every_metric_that_we_name(submissions: Submissions) -> None:
    expected = {f"ray_{name}" + ("_total" if metric.kind == "counter" else "") for name, metric in METRICS.items()}
    assert submissions.metrics == expected


def test_a_plan_is_made_by_a_submission_too(submissions: Submissions) -> None:
    assert submissions.plan.returncode == 0, submissions.plan.stdout + submissions.plan.stderr
    [line] = [line for line in submissions.plan.stdout.splitlines() if line.startswith('{"images"')]
    assert json.loads(line)["images"] == NUM_IMAGES + 1
