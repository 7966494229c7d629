"""Joining a Ray cluster, or starting one of our own: what it has, and the settings that a job makes and takes back.

Knows no job. Everything that a session changes in this process - warning filters, loggers, signal handlers, Ray's
environment variables, the settings of Ray Data - is as before once it has ended.
"""

import logging
import os
import signal
import tempfile
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.data import DataContext
from ray.util.annotations import RayDeprecationWarning
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from captioner.captioning.resources import Cluster
from captioner.cluster.interrupts import watch_ray_processes
from captioner.cluster.ray_private import LOCAL_RAY_SETTINGS, has_autoscaler, light_local_ray, quiet_core
from captioner.errors import JobError, ResourceError

__all__ = [
    "OFF_MODEL_SELECTOR",
    "STAGE_LABEL",
    "cluster_of",
    "data_settings",
    "joined_cluster",
    "living_nodes",
    "start_beside_driver",
]

STAGE_LABEL = "captioner-stage"
"""The node label that keeps decoding off GPU nodes."""

MODEL_STAGE = "model"
"""Its value on GPU nodes."""

OFF_MODEL_SELECTOR = {STAGE_LABEL: f"!{MODEL_STAGE}"}
"""Label selector of tasks that read, decode or write: any node but those for the model."""

_LOCAL_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait take the cores of decoders and of other programs
    "RAY_worker_niceness": "0",  # of 15, as Ray has it, a job beside a busy program gets a thirtieth of a core
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # an actor, which asks whether a node of a cluster is to be taken away
}
"""What the processes of a local Ray find in their environment, unless the user has set it otherwise."""

_TARGET_BLOCK_BYTES = 32 << 20  # 200 pixel arrays at 224 px: work starts at once, memory stays flat
_DATA_SETTINGS: Mapping[str, Any] = {
    "target_max_block_size": _TARGET_BLOCK_BYTES,
    "enable_progress_bars": False,
    "memory_usage_poll_interval_s": None,  # a thread for each call, for a figure that no job shows
    # Deaths in a row of workers that could not load: another one may, on another node.
    "max_consecutive_actor_init_deaths": 1,
    # A load that raised is tried again in its process: Ray would not restart that worker, and its tasks end the job.
    "actor_init_retry_on_errors": True,
    "actor_init_max_retries": 1,
    "execution_no_progress_timeout_s": -1,  # a job may wait for a GPU as long as it takes
}
_LOG_LEVELS = {"ray": logging.ERROR, "ray.data": logging.CRITICAL}  # an error of a stage is one line of ours
_VITAL = {"raylet": "the raylet of the local Ray", "gcs_server": "the gcs_server of the local Ray"}


@contextmanager
def joined_cluster() -> Iterator[Cluster]:
    """Join the cluster of RAY_ADDRESS, or start a local one for the time of the block; yield what it has.

    Raises JobError where neither is possible, and in the block once a process of the local Ray has died.
    """
    address = os.environ.get("RAY_ADDRESS")
    with ExitStack() as held:
        for setting in (_log_levels(), _environment(), _warning_filters()):
            held.enter_context(setting)
        if not address:
            os.environ.update(_LOCAL_ENVIRONMENT | os.environ)
            held.enter_context(light_local_ray())
        _start_ray(address)
        held.callback(ray.shutdown)
        held.enter_context(data_settings())
        held.enter_context(watch_ray_processes({} if address else _local_ray_processes()))
        yield cluster_of(ray.nodes(), has_autoscaler())  # type: ignore[no-untyped-call]


def cluster_of(nodes: Iterable[Mapping[str, Any]], can_grow: bool) -> Cluster:
    """Return the resources of all living nodes, CPUs only of those that may decode. nodes: as in `ray.nodes()`."""
    alive = [node for node in nodes if node["Alive"]]
    cpus = _each([node for node in alive if node["Labels"].get(STAGE_LABEL) != MODEL_STAGE], "CPU")
    gpus = _each(alive, "GPU")
    return Cluster(cpus=sum(cpus), gpus=sum(gpus), can_grow=can_grow, node_cpus=cpus, node_gpus=gpus)


def living_nodes() -> set[str]:
    """Return the ids of the nodes that are alive."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]


def start_beside_driver(kind: type, *arguments: Any) -> Any:
    """Return an actor of a class on the driver's own node: no loss of another node takes it away."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "scheduling_strategy": here, "max_restarts": -1, "max_task_retries": -1}
    return ray.remote(kind).options(**options).remote(*arguments)


def _each(nodes: Sequence[Mapping[str, Any]], resource: str) -> tuple[float, ...]:
    """Return the amount of a resource on each node that has it."""
    return tuple(node["Resources"][resource] for node in nodes if resource in node["Resources"])


def _start_ray(address: str | None) -> None:
    """Join a cluster, or start a local Ray. Raises JobError where that fails."""
    local: dict[str, Any] = {} if address else {"include_dashboard": False, **LOCAL_RAY_SETTINGS}
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        with quiet_core():
            ray.init(address=address or "local", logging_level=logging.ERROR, log_to_driver=False, **local)
    except Exception as error:  # Ray raises a plain Exception after a timeout
        if "AF_UNIX path length" in str(error):
            raise ResourceError(
                f"Ray puts its sockets below {_temporary_folder()}, and their names grow too long for a socket;"
                " expected a shorter folder for temporary files: TMPDIR=/tmp, or RAY_TMPDIR=/tmp"
            ) from error
        where = f"the cluster of RAY_ADDRESS, {address}, was not joined" if address else "no local Ray could be started"
        wanted = "a head that runs there" if address else "a machine with CPU and memory to spare"
        raise JobError(f"{where}: {' '.join(str(error).split())[:300]}; expected {wanted}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)  # Ray's own handler exits at once without a word


def _temporary_folder() -> str:
    return os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()


def _local_ray_processes() -> dict[int, str]:
    """Return the processes of this one's local Ray whose death Ray itself answers a minute later, by ending this one.

    Empty where the system does not list the children of a process.
    """
    found: dict[int, str] = {}
    for listing in Path("/proc/self/task").glob("*/children"):
        for pid in map(int, listing.read_text().split()):
            command = Path(f"/proc/{pid}/comm").read_text().strip()
            found |= {pid: _VITAL[command]} if command in _VITAL else {}
    return found


@contextmanager
def _log_levels() -> Iterator[None]:
    before = {name: logging.getLogger(name).level for name in _LOG_LEVELS}
    for name, level in _LOG_LEVELS.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _environment() -> Iterator[None]:
    """Take back what Ray writes into the environment, a mode of authentication for one."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _warning_filters() -> Iterator[None]:
    with warnings.catch_warnings():
        # Ray 2.60 deprecates passing options by the name that only remote functions know, and has no other way yet.
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated", RayDeprecationWarning)
        # A small job does not reach the limit on write tasks, which is no fault.
        warnings.filterwarnings("ignore", "The maximum number of concurrent tasks for 'Write'", UserWarning)
        yield


@contextmanager
def data_settings() -> Iterator[None]:
    """Let Ray Data run in the block as a job wants it, in this process."""
    context = DataContext.get_current()
    before = {name: getattr(context, name) for name in _DATA_SETTINGS}
    for name, value in _DATA_SETTINGS.items():
        setattr(context, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
