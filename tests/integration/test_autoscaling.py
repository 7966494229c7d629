"""A job on a cluster that grows from nothing: real raylets, Ray's own autoscaler, GPUs that only the scheduler sees."""

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from captioner.config import VerifyConfig
from captioner.tables.verification import verify
from tests.bundles import save_tiny_bundle
from tests.guard import GUARD_S
from tests.http_server import SlowStore, serving
from tests.integration.clusters import LocalCluster, autoscaling_cluster, node_type, wait_until
from tests.sample_images import encoded

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NUM_IMAGES = 3000
MOST_NODES = 2  # of the kind that is killed
LATENCY_S = 1.0  # 75 s of fetching, forty at a time; until no image has to wait any longer
NUM_BEFORE = 2600  # images that the store answers before another node has come


def node_types(*, num_decode: int, num_model: int) -> dict[str, Any]:
    """What the autoscaler may add."""
    return {
        "decode": node_type(max_workers=num_decode, CPU=2, labels={"captioner-stage": "decode"}),
        "model": node_type(max_workers=num_model, CPU=2, GPU=1, labels={"captioner-stage": "model"}),
    }


@dataclass
class Sight:
    """What ran where at one moment."""

    num_gpu_nodes: int
    model_nodes: list[str]
    """The node of each model worker."""

    decode_nodes: list[str]


@dataclass
class History:
    """What was seen of one job and its cluster, from outside."""

    sights: list[Sight] = field(default_factory=list)
    stages_of_decoders: set[str] = field(default_factory=set)
    killed: str = ""
    num_sights_at_kill: int = 0
    num_written_at_kill: int = 0
    exit_code: int | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    log: str = ""
    output: Path = Path()

    @property
    def num_gpu_nodes(self) -> list[int]:
        """GPU nodes at each moment."""
        return [sight.num_gpu_nodes for sight in self.sights]

    def new_nodes(self, of: Callable[[Sight], list[str]]) -> set[str]:
        """Nodes that do a kind of work and did not before the kill; none before it."""
        known = {node for sight in self.sights[: self.num_sights_at_kill] for node in of(sight)}
        after = self.sights[self.num_sights_at_kill :] if self.killed else []
        return {node for sight in after for node in of(sight)} - known

    def note(self, cluster: LocalCluster) -> Sight:
        """Note what runs where."""
        seen = cluster.look()
        stages = {node["NodeID"]: node["Labels"].get("captioner-stage", "") for node in seen["nodes"]}
        places = [(actor["ActorClassName"], actor["Address"]["NodeID"]) for actor in seen["actors"]]
        sight = Sight(
            sum(bool(node["Resources"].get("GPU")) for node in seen["nodes"]),
            [node for name, node in places if "Caption" in name and node in stages],
            [node for name, node in places if "Decode" in name and node in stages],
        )
        self.stages_of_decoders |= {stages[node] for node in sight.decode_nodes}
        self.sights.append(sight)
        return sight

    def kill(self, cluster: LocalCluster, node: str) -> None:
        """Take a node away, as a spot market does."""
        self.killed, self.num_sights_at_kill = node, len(self.sights)
        self.num_written_at_kill = _num_written(self.output)
        cluster.kill_node({"NodeID": node})


def run(
    folder: Path, store: SlowStore, types: Mapping[str, Any], of: Callable[[Sight], list[str]], *flags: str
) -> History:
    """One job from its first node to its last; once all nodes that `of` sees are there and some images written, one of
    them is killed. The store gives no image before all nodes are there, and not the last ones before another has come:
    the job must not end before."""
    history, are_there = History(output=folder / "captions"), False
    store.latency_s = LATENCY_S
    store.hold_after(0)
    with autoscaling_cluster(types) as cluster:
        listed = folder / "images.txt"
        listed.write_text("".join(f"{store.url(name[1:])}\n" for name in store.files))
        job = _start_job(cluster, listed, history.output, save_tiny_bundle(folder / "bundle"), *flags)
        give_up = time.monotonic() + GUARD_S
        while job.poll() is None:
            if not are_there and time.monotonic() > give_up:
                job.kill()
            nodes = of(history.note(cluster))
            if not are_there and len(set(nodes)) == MOST_NODES:
                are_there = True
                store.hold_after(NUM_BEFORE)
            if not history.killed and len(set(nodes)) == MOST_NODES and _num_written(history.output):
                history.kill(cluster, nodes[0])
            if history.new_nodes(of):
                store.latency_s = 0.0
                store.hold_after(math.inf)
            time.sleep(0.3)
        stdout, _ = job.communicate()
        history.log = (history.output.parent / "log").read_text()
        history.exit_code = job.returncode
        history.summary = json.loads(stdout.splitlines()[-1]) if stdout.strip() else {}
        wait_until(lambda: history.note(cluster).num_gpu_nodes == 0)
    return history


@pytest.fixture(scope="module")
def slow_store() -> Iterator[SlowStore]:
    """3,000 images."""
    store = SlowStore()
    store.files.update({f"/{seed:04d}.jpg": encoded(seed=seed) for seed in range(NUM_IMAGES)})
    with serving(store):
        yield store


@pytest.fixture(scope="module")
def history(slow_store: SlowStore, tmp_path_factory: pytest.TempPathFactory) -> History:
    """A job of which one of two GPU nodes is killed."""
    return run(
        tmp_path_factory.mktemp("gpu"),
        slow_store,
        node_types(num_decode=1, num_model=2),
        attrgetter("model_nodes"),
        "--workers=1:2",
        "--fetch-concurrency=20",  # by each of two decode workers
    )


@pytest.fixture(scope="module")
def decode_history(slow_store: SlowStore, tmp_path_factory: pytest.TempPathFactory) -> History:
    """A job of which one of two nodes that fetch and decode is killed."""
    return run(
        tmp_path_factory.mktemp("decode"),
        slow_store,
        node_types(num_decode=2, num_model=1),
        attrgetter("decode_nodes"),
        "--workers=1",
        "--cpu-workers=4",  # two fit on a node
        "--fetch-concurrency=10",
    )


def _start_job(cluster: LocalCluster, images: Path, output: Path, bundle: str, *flags: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-W", "ignore", str(ROOT / "jobs" / "caption.py"), str(images), str(output)]
    command += ["--model", bundle, "--gpus-per-worker", "1", "--device", "cpu", *flags]
    command += ["--max-new-tokens", "24", "--rows-per-part", "128", "--slots", "8"]
    command += ["--fetch-timeout-s", str(GUARD_S)]  # as long as the store may be held
    quick = {"RAY_DATA_MIN_GAP_BETWEEN_AUTOSCALING_REQUESTS": "2"}
    environment = {**os.environ, **cluster.environment, **quick, "PYTHONPATH": str(ROOT)}
    with (output.parent / "log").open("w") as log:
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)


def _num_written(output: Path) -> int:
    return sum(int(part.stem.split("-")[-2]) for part in output.glob("captions/part-*.parquet"))


def assert_whole(history: History) -> None:
    """Assert that the job went well though a node was killed, and that each image has one caption."""
    assert history.killed, "the injector came too late to do anything"
    assert history.exit_code == 0, history.log
    assert (history.summary["read"], history.summary["captioned"]) == (NUM_IMAGES, NUM_IMAGES)
    captions = pd.read_parquet(history.output / "captions")
    assert len(captions) == captions["key"].nunique() == NUM_IMAGES
    assert verify(VerifyConfig(table=str(history.output)))["ok"]


def test_the_job_waits_for_gpus_and_says_so(history: History) -> None:
    assert history.num_gpu_nodes[0] == 0
    assert re.search(r"waiting for GPUs: .*, a worker needs 1", history.log)  # the first node may have come by then


def test_all_gpu_nodes_come_while_there_is_work_and_go_when_there_is_none(history: History) -> None:
    assert max(history.num_gpu_nodes) == 2
    assert history.num_gpu_nodes[-1] == 0


def test_both_gpu_nodes_are_asked_for_before_the_first_has_done_anything(history: History) -> None:
    assert max(len(sight.model_nodes) for sight in history.sights) == 2, "the store waited in vain for the second"


def test_decoding_never_takes_a_gpu_node(history: History, decode_history: History) -> None:
    assert history.stages_of_decoders == decode_history.stages_of_decoders == {"decode"}


def test_a_killed_gpu_node_loses_no_row_and_duplicates_none(history: History) -> None:
    assert_whole(history)


def test_a_killed_gpu_node_is_replaced(history: History) -> None:
    after = history.num_gpu_nodes[history.num_gpu_nodes.index(2) :]
    fallen = after.index(1)
    assert 2 in after[fallen:]
    assert history.new_nodes(attrgetter("model_nodes"))


def test_a_killed_decode_node_loses_no_row_and_duplicates_none(decode_history: History) -> None:
    assert_whole(decode_history)


def test_a_killed_decode_node_is_replaced(decode_history: History) -> None:
    assert decode_history.num_written_at_kill < NUM_IMAGES
    assert decode_history.new_nodes(attrgetter("decode_nodes"))
