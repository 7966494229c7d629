"""Every use of a part of Ray that Ray does not promise to keep. No other module has one, and a test lists these.

Each names the public way that it waits for, and what breaks without it. Ray is bounded in pyproject.toml while one is
left: read this file before the bound is raised.
"""

import importlib
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch
from uuid import uuid4

import ray
import ray._private.worker
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.data._internal.cluster_autoscaler import ClusterAutoscaler
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.interfaces import ExecutionResources
from ray.data._internal.execution.operators.input_data_buffer import InputDataBuffer

from captioner.cluster.interrupts import StopRequest
from captioner.machine import num_cpus

__all__ = [
    "LOCAL_RAY_SETTINGS",
    "drop_unread_tasks",
    "has_autoscaler",
    "light_local_ray",
    "light_trainer",
    "quiet_core",
]

log = logging.getLogger("captioner")

_LEVEL_LINE = "Set ray log level from environment variable"  # which Ray prints whatever the level

LOCAL_RAY_SETTINGS = {"_system_config": {"num_workers_soft_limit": num_cpus() + 8}}
"""Arguments of `ray.init` for a local Ray: how many idle worker processes it keeps.

Waits for: an argument of `ray.init` for it. Without it Ray keeps as many as there are CPUs, and on a small machine each
write task starts a Python process of its own."""


def has_autoscaler() -> bool:
    """Return whether an autoscaler reports to this cluster, which then may grow.

    Waits for: the same in `ray.autoscaler.sdk` or the runtime context. Without it a job cannot tell a cluster that is
    too small from one that has yet to grow, and either hangs or is refused."""
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    return int(status.stats.autoscaler_version or 0) > 0


def drop_unread_tasks(rows: ray.data.Dataset, stop: StopRequest) -> None:
    """Take back the read tasks that have not started, once the job is to stop.

    Waits for: a way to end the input of a running Dataset. Without it each of them is started, only to find the stop
    file."""

    class DropUnreadTasks(ExecutionCallback):
        def on_execution_step(self, executor: Any) -> None:
            if stop.is_made:
                for operator, state in executor._topology.items():
                    if isinstance(operator, InputDataBuffer):
                        state.output_queue.clear()

    rows.context.custom_execution_callback_classes = [DropUnreadTasks]


def light_trainer(trainer: Any) -> Any:
    """Return a class of Ray Train trainers without two actors: one that frees their workers should their controller
    die, and one that shares out datasets, of which a fit has none.

    Waits for: settings of RunConfig. On a cluster without a dashboard the first cannot ask whether the controller
    lives, and warns once a second; the end of the job frees the workers anyway. The second is a Python process more
    each time that the workers are started."""
    unwanted = {"PlacementGroupCleanerCallback", "DatasetsCallback"}

    def callbacks(self: Any) -> list[Any]:
        made = trainer._create_default_callbacks(self)
        return [callback for callback in made if type(callback).__name__ not in unwanted]

    return type(trainer.__name__, (trainer,), {"_create_default_callbacks": callbacks})


@contextmanager
def light_local_ray() -> Iterator[None]:
    """Start a local Ray in the block, and run Ray Data on it, without the processes that serve no job on one machine.

    Left out are Ray's autoscaler, its dashboard, which else runs even if it is not wanted, and what forwards the logs
    of workers; and Ray Data's actors for the dashboard's figures, for a cluster that grows, and for where actors are.
    Each is a Python process; together they take a third of a small job's processor time. Metrics are collected all the
    same. Waits for: arguments of `ray.init` and settings of DataContext for them. Without it a job starts some seconds
    later, as it does where a release of Ray has another name for one of these."""
    try:
        replaced = [(_found(owner), name, by) for owner, names in _replacements().items() for name, by in names.items()]
    except (ImportError, AttributeError) as error:
        log.warning("local_ray=plain reason=%s", error)
        replaced = []
    with ExitStack() as held:
        for owner, name, by in replaced:
            held.enter_context(patch.object(owner, name, by))
        yield


def _found(owner: str) -> Any:
    """Return a module, or a class of one, after checking that it has what is to be replaced."""
    module, _, kind = owner.partition(":")
    found: Any = importlib.import_module(module)
    found = getattr(found, kind) if kind else found
    for name in _replacements()[owner]:
        getattr(found, name)
    return found


def _replacements() -> Mapping[str, Mapping[str, Any]]:
    """Return what stands in for what: names of modules or `module:class` -> attributes -> replacements."""
    actor_pool = "ray.data._internal.execution.operators.actor_pool_map_operator"
    return {
        "ray._private.node:Node": dict.fromkeys(("start_monitor", "start_api_server", "start_log_monitor"), _nothing),
        "ray.data._internal.stats:_StatsManager": {
            "update_execution_metrics": _nothing,
            "update_iteration_metrics": _nothing,
            "register_dataset_to_stats_actor": _nothing,
            "gen_dataset_id_from_stats_actor": lambda: uuid4().hex,
        },
        "ray.data._internal.execution.streaming_executor": {
            "create_cluster_autoscaler": lambda *_, **__: _OneMachine()
        },
        actor_pool: {
            "get_or_create_actor_location_tracker": lambda: _NoTracker(),
            "get_actor_locations": lambda _: {},  # then an actor is where it was when it became ready
        },
    }


def _nothing(*_: Any, **__: Any) -> None:
    """Do nothing."""


class _OneMachine(ClusterAutoscaler):
    """Stands in for Ray Data's autoscaler: a local Ray has what it has.

    It asks once, at the start: Ray Data asks again as it ends, and where the GCS server has died, no answer comes."""

    def __init__(self) -> None:
        found: Any = ray.cluster_resources()  # type: ignore[no-untyped-call]
        self._total: ExecutionResources = ExecutionResources.from_resource_dict(found)

    @classmethod
    def create(cls, *_: Any, **__: Any) -> "_OneMachine":
        """Return one, whatever it is made of."""
        return cls()

    def try_trigger_scaling(self) -> None:
        """Do nothing."""

    def on_executor_shutdown(self) -> None:
        """Do nothing."""

    def get_total_resources(self) -> ExecutionResources:
        """Return what the machine has."""
        return self._total


class _NoTracker:
    """Stands in for the actor that tracks on which node each actor of Ray Data is. Sent to workers."""

    @property
    def update_actor_location(self) -> "_NoTracker":
        """Return what has a `remote` that does nothing."""
        return self

    def remote(self, *_: Any) -> None:
        """Do nothing."""


@contextmanager
def quiet_core() -> Iterator[None]:
    """Connect this process to Ray in the block so that Ray's C++ part prints nothing but what ends the process.

    It prints an error for each actor of Ray Data that may restart, though Ray Data keeps the arguments it warns of. A
    level that the user set stays. Waits for: a level of that log among the arguments of `ray.init`; the environment
    variable would hush the log files of the raylet and the GCS server as well. Without it such lines are printed."""
    connect = getattr(ray._private.worker, "connect", None)
    if connect is None or "RAY_BACKEND_LOG_LEVEL" in os.environ:
        yield
        return

    def connect_quietly(*arguments: Any, **options: Any) -> Any:
        with patch.dict(os.environ, {"RAY_BACKEND_LOG_LEVEL": "fatal"}), _without_lines(_LEVEL_LINE):
            return connect(*arguments, **options)

    with patch.object(ray._private.worker, "connect", connect_quietly):
        yield


@contextmanager
def _without_lines(text: str) -> Iterator[None]:
    """Print what the block writes to stderr at its end, without the lines that hold `text`; from C++, too."""
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            kept.seek(0)
            os.write(2, b"".join(line for line in kept if text.encode() not in line))
