"""Ray clusters of a test's own, ended by their pids: a head whose autoscaler starts raylets on this machine."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.guard import GUARD_S

_HEAD_ID = "f" * 51 + "00000"  # the node provider's own constant
_EMPTY = [
    "cluster_synced_files",
    "rsync_exclude",
    "rsync_filter",
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
]
_OBJECT_STORE_BYTES = 100_000_000


_OBSERVER = """
import json, sys
from ray._private.state import GlobalState
from ray._raylet import GcsClientOptions
state = GlobalState()
state._initialize_global_state(GcsClientOptions.create(sys.argv[1], None, True, False))
for _ in sys.stdin:
    nodes = [node for node in state.node_table() if node["Alive"]]
    actors = list(state.actor_table(None, None, "ALIVE").values())
    print(json.dumps({"nodes": nodes, "actors": actors}, default=str), flush=True)
"""


@dataclass
class LocalCluster:
    """A running head. `environment` is what a driver needs to join it."""

    address: str
    environment: dict[str, str]
    head: subprocess.Popen[bytes]
    folder: Path
    _observer: "subprocess.Popen[str] | None" = field(default=None, repr=False)

    def look(self) -> dict[str, Any]:
        """Return `nodes` and `actors` that are alive. Another process asks: one that lost its cluster is aborted."""
        if self._observer is None:
            self._observer = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", _OBSERVER, self.address],
                env={**os.environ, **self.environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._observer.stdin is not None
        assert self._observer.stdout is not None
        self._observer.stdin.write("\n")
        self._observer.stdin.flush()
        seen: dict[str, Any] = json.loads(self._observer.stdout.readline())
        return seen

    def nodes(self) -> list[dict[str, Any]]:
        """Return the nodes that are alive, as `ray.nodes()` tells them."""
        return list(self.look()["nodes"])

    def actors(self) -> list[dict[str, Any]]:
        """Return the actors that run now, with the class and the node of each."""
        return list(self.look()["actors"])

    def gpu_nodes(self) -> list[dict[str, Any]]:
        """Return the nodes that have a GPU and are alive."""
        return [node for node in self.nodes() if node["Resources"].get("GPU")]

    def kill_node(self, node: Mapping[str, Any]) -> None:
        """End a node as a spot interruption does: its raylet and workers at once, without a word."""
        raylets = [pid for pid, line in _processes() if "/raylet/raylet" in line and node["NodeID"] in _environ(pid)]
        assert raylets, f"no raylet of node {node['NodeID']}"
        for pid in [*_descendants(raylets[0]), raylets[0]]:
            _kill(pid)


def node_type(*, max_workers: int, labels: Mapping[str, str] | None = None, **resources: int) -> dict[str, Any]:
    """Return a node type of an autoscaling cluster."""
    return {
        "resources": {**resources, "object_store_memory": _OBJECT_STORE_BYTES},
        "node_config": {},
        "min_workers": 0,
        "max_workers": max_workers,
        "labels": dict(labels or {}),
    }


@contextmanager
def autoscaling_cluster(node_types: Mapping[str, Any], idle_timeout_s: float = 6) -> Iterator[LocalCluster]:
    """Yield a head without CPUs whose autoscaler starts and ends nodes of these types on this machine."""
    port = _free_port()
    address = f"127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        config = {
            "cluster_name": "test",
            "max_workers": sum(kind["max_workers"] for kind in node_types.values()),
            "upscaling_speed": 100,
            "idle_timeout_minutes": idle_timeout_s / 60,
            "provider": {
                "type": "external",
                "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
                "gcs_address": address,
                "launch_multiple": True,
                "head_node_id": _HEAD_ID,
            },
            "available_node_types": {"ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}}
            | dict(node_types),
            "head_node_type": "ray.head.default",
            **{name: [] for name in _EMPTY},
            "file_mounts": {},
            "file_mounts_sync_continuously": False,
            "auth": {},
            "docker": {},
        }
        file = Path(folder, "autoscaling.yaml")
        file.write_text(yaml.safe_dump(config))
        environment = {
            "RAY_enable_autoscaler_v2": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        }
        flags = ["--num-cpus=0", "--num-gpus=0", f"--autoscaling-config={file}", "--include-dashboard=false"]
        with _head(port, Path(folder), flags, environment) as cluster:
            yield cluster


@contextmanager
def job_server(environment: Mapping[str, str], num_cpus: int = 2) -> Iterator[tuple[LocalCluster, str]]:
    """Yield a cluster of one node and the address of its job server; `environment` is its jobs'."""
    port, dashboard, agent = _free_port(), _free_port(), _free_port()
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        flags = [f"--num-cpus={num_cpus}", "--include-dashboard=true", f"--dashboard-port={dashboard}"]
        flags.append(f"--dashboard-agent-listen-port={agent}")  # another Ray on this machine has the usual one
        own = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "RAY_metrics_report_interval_ms": "500"}
        with _head(port, Path(folder), flags, {**own, **environment}) as cluster:
            address = f"http://127.0.0.1:{dashboard}"
            wait_until(lambda: _takes_jobs(address))
            yield cluster, address


def _takes_jobs(address: str) -> bool:
    """Say whether a submission would be accepted: the server is up before what runs its jobs."""
    question = urllib.request.Request(
        f"{address}/api/jobs/", b'{"entrypoint": "true"}', {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(question, timeout=30):
            return True
    except OSError:
        return False


@contextmanager
def _head(port: int, folder: Path, flags: list[str], environment: Mapping[str, str]) -> Iterator[LocalCluster]:
    shared = {"RAY_AUTH_MODE": "disabled"}
    python = [sys.executable, "-W", "ignore", "-m", "ray.scripts.scripts"]
    command = [*python, "start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1"]
    command += [f"--temp-dir={folder}/s", f"--object-store-memory={_OBJECT_STORE_BYTES}", "--disable-usage-stats"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with (folder / "head.log").open("wb") as log:
        head = subprocess.Popen(
            [*command, *flags],
            env={**kept, **shared, **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    cluster = LocalCluster(f"127.0.0.1:{port}", {**shared, "RAY_ADDRESS": f"127.0.0.1:{port}"}, head, folder)
    try:
        wait_until(lambda: _is_up(cluster))
        yield cluster
    except BaseException:
        print((folder / "head.log").read_text())
        raise
    finally:
        _end(cluster)


def _is_up(cluster: LocalCluster) -> bool:
    assert cluster.head.poll() is None, (cluster.folder / "head.log").read_text()
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", int(cluster.address.rpartition(":")[2]))):
            return False
    return "Ray runtime started" in (cluster.folder / "head.log").read_text() and bool(cluster.nodes())


def _end(cluster: LocalCluster) -> None:
    """End the head and every process that it or its autoscaler started: all of them name the cluster's folder.

    At once: asked to end, Ray waits 20 s for its own."""
    if cluster._observer is not None:
        cluster._observer.kill()
        cluster._observer.communicate()
    for pid in _descendants(cluster.head.pid):
        _kill(pid)
    cluster.head.kill()
    cluster.head.wait()
    marks = (str(cluster.folder), cluster.address)
    for _ in range(3):
        left = [pid for pid, line in _processes() if any(mark in line for mark in marks)]
        for pid in {own for parent in left for own in [parent, *_descendants(parent)]} - {os.getpid()}:
            _kill(pid)
        time.sleep(0.2)


def wait_until(holds: Callable[[], object], explain: Callable[[], str] = str) -> None:
    """Return as soon as `holds` does; fail the test after `GUARD_S`."""
    give_up = time.monotonic() + GUARD_S
    while not holds():
        assert time.monotonic() < give_up, f"not so after {GUARD_S} s: {explain()}"
        time.sleep(0.2)


def _processes() -> Iterator[tuple[int, str]]:
    for place in Path("/proc").iterdir():
        if place.name.isdecimal():
            try:
                yield int(place.name), (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue


def _environ(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _descendants(pid: int) -> list[int]:
    try:
        text = " ".join((task / "children").read_text() for task in Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return []
    return [own for child in map(int, text.split()) for own in [child, *_descendants(child)]]


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _free_port() -> int:
    """Return a port that nobody has or gets by chance: above those of Ray's workers, below those of any socket."""
    for port in random.SystemRandom().sample(range(20_000, 32_768), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("a hundred ports are taken")
