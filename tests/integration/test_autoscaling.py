"""A job on a cluster that grows from nothing: real raylets, Ray's own autoscaler, GPUs that only the scheduler sees."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from captioner.config import VerifyConfig
from captioner.verification import verify
from tests.bundles import save_tiny_bundle
from tests.integration.clusters import LocalCluster, autoscaling_cluster, node_type, wait_until
from tests.pictures import encoded

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

ROOT = Path(__file__).parents[2]
NUM_IMAGES = 3000
NODE_TYPES = {
    "decode": node_type(max_workers=1, CPU=2, labels={"captioner-stage": "decode"}),
    "model": node_type(max_workers=2, CPU=2, GPU=1, labels={"captioner-stage": "model"}),
}


@dataclass
class History:
    """What was seen of one job and its cluster, from outside."""

    num_gpu_nodes: list[int] = field(default_factory=list)
    num_model_workers: list[int] = field(default_factory=list)
    stages_of_decoders: set[str] = field(default_factory=set)
    killed: str = ""
    num_written_at_kill: int = 0
    exit_code: int | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    log: str = ""
    output: Path = Path()

    def note(self, cluster: LocalCluster) -> list[str]:
        """Note what runs where; return the nodes that have a model worker."""
        seen = cluster.look()
        stages = {node["NodeID"]: node["Labels"].get("captioner-stage", "") for node in seen["nodes"]}
        places = [(actor["ActorClassName"], actor["Address"]["NodeID"]) for actor in seen["actors"]]
        self.num_gpu_nodes.append(sum(bool(node["Resources"].get("GPU")) for node in seen["nodes"]))
        self.stages_of_decoders |= {stages[node] for name, node in places if "Decode" in name and node in stages}
        models = [node for name, node in places if "Caption" in name]
        self.num_model_workers.append(len(models))
        return models


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[History]:
    """One job of 3,000 images from the first GPU node to the last, one of them killed on the way."""
    images, output = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("out") / "captions"
    for seed in range(NUM_IMAGES):
        (images / f"{seed:04d}.jpg").write_bytes(encoded(seed=seed))
    bundle = save_tiny_bundle(tmp_path_factory.mktemp("bundle"))
    with autoscaling_cluster(NODE_TYPES) as cluster:
        history = History(output=output)
        job = _start_job(cluster, images, output, bundle)
        while job.poll() is None:
            model_nodes = history.note(cluster)
            num_written = _num_written(output)
            if not history.killed and len(model_nodes) == 2 and num_written > 0:
                history.killed, history.num_written_at_kill = model_nodes[0], num_written
                cluster.kill_node({"NodeID": model_nodes[0]})
            time.sleep(0.3)
        stdout, _ = job.communicate()
        history.log = (output.parent / "log").read_text()
        history.exit_code = job.returncode
        history.summary = json.loads(stdout.splitlines()[-1]) if stdout.strip() else {}
        wait_until(lambda: history.note(cluster) == [] and history.num_gpu_nodes[-1] == 0, 90)
        yield history


def _start_job(cluster: LocalCluster, images: Path, output: Path, bundle: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-W", "ignore", str(ROOT / "jobs" / "caption.py"), str(images), str(output)]
    command += ["--model", bundle, "--workers", "1:2", "--gpus-per-worker", "1", "--device", "cpu"]
    command += ["--max-new-tokens", "24", "--rows-per-part", "128", "--slots", "8"]
    quick = {"RAY_DATA_MIN_GAP_BETWEEN_AUTOSCALING_REQUESTS": "2"}
    environment = {**os.environ, **cluster.environment, **quick, "PYTHONPATH": str(ROOT)}
    with (output.parent / "log").open("w") as log:
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)


def _num_written(output: Path) -> int:
    return sum(int(part.stem.split("-")[-2]) for part in output.glob("captions/part-*.parquet"))


def test_the_job_waits_for_gpus_and_says_so(history: History) -> None:
    assert history.num_gpu_nodes[0] == 0
    assert "waiting for GPUs: the cluster has 0, a worker needs 1" in history.log


def test_all_gpu_nodes_come_while_there_is_work_and_go_when_there_is_none(history: History) -> None:
    assert max(history.num_gpu_nodes) == 2
    assert history.num_gpu_nodes[-1] == 0


def test_both_gpu_nodes_are_at_work_before_the_first_could_have_done_it_alone(history: History) -> None:
    assert max(history.num_model_workers) == 2
    assert history.num_written_at_kill < NUM_IMAGES / 2


def test_decoding_never_takes_a_gpu_node(history: History) -> None:
    assert history.stages_of_decoders == {"decode"}


def test_a_killed_gpu_node_costs_no_row_and_doubles_none(history: History) -> None:
    assert history.killed, "the injector came too late to do anything"
    assert history.exit_code == 0, history.log
    assert (history.summary["read"], history.summary["captioned"]) == (NUM_IMAGES, NUM_IMAGES)
    captions = pd.read_parquet(history.output / "captions")
    assert len(captions) == captions["key"].nunique() == NUM_IMAGES
    assert verify(VerifyConfig(table=str(history.output)))["ok"]


def test_a_killed_gpu_node_is_replaced(history: History) -> None:
    after = history.num_gpu_nodes[history.num_gpu_nodes.index(2) :]
    fallen = after.index(1)
    assert 2 in after[fallen:]
