"""The private parts of Ray that are used, all of them in one module: a new one is a decision, made here."""

import ast
import os
from pathlib import Path
from typing import Any

import pytest
import ray
import ray._private.node
import ray._private.worker
from ray.data._internal.cluster_autoscaler import ClusterAutoscaler
from ray.train.torch import TorchTrainer

import captioner
from captioner.cluster import ray_private

PACKAGE = Path(captioner.__file__).parent
ROOM = PACKAGE / "cluster"

USES = {
    "_private",
    "ray._private.node:Node",
    "ray._private.worker",
    "ray.data._internal.cluster_autoscaler.ClusterAutoscaler",
    "ray.data._internal.execution.interfaces.ExecutionResources",
    "ray.data._internal.execution.operators.actor_pool_map_operator",
    "ray.data._internal.execution.streaming_executor",
    "ray.data._internal.stats:_StatsManager",
    "ray.autoscaler.v2.sdk.get_cluster_status",
    "ray.data._internal.execution.execution_callback.ExecutionCallback",
    "ray.data._internal.execution.operators.input_data_buffer.InputDataBuffer",
    "custom_execution_callback_classes",
    "_create_default_callbacks",
    "_system_config",
    "_topology",
}
UNPROMISED = ("ray.autoscaler.v2", "ray.experimental")
"""Modules of Ray that are private without an underscore."""

SETTINGS = {"_system_config", "custom_execution_callback_classes"}
"""Names of arguments and attributes of Ray that are private wherever they stand."""


def is_private(name: str) -> bool:
    """Whether a name has a part with one leading underscore."""
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def is_private_text(value: object) -> bool:
    """Whether a string names a private part of Ray, to be imported or set by its name."""
    return value in SETTINGS or (isinstance(value, str) and value.startswith("ray.") and is_private(value))


def imports(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "ray"}


def private_uses(path: Path) -> set[str]:
    """Return the private parts of Ray that a file imports, reads or names."""
    tree = ast.parse(path.read_text())
    found = {name for name in imports(tree) if is_private(name) or name.startswith(UNPROMISED)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (is_private(node.attr) or node.attr in SETTINGS):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                found.add(node.attr)
        elif isinstance(node, ast.Constant) and is_private_text(node.value):
            found.add(str(node.value))
    return found


def test_private_parts_of_ray_are_used_in_one_module_and_these_are_all() -> None:
    assert private_uses(ROOM / "ray_private.py") == USES, "a new use is a decision, and one that went leaves the list"


def test_no_other_module_uses_a_private_part_of_ray() -> None:
    for path in sorted(ROOM.rglob("*.py")):
        if path.name != "ray_private.py":
            assert not private_uses(path), f"{path.name}: move it to ray_private.py, or find a public way"


def test_a_private_part_is_found_however_it_is_reached(tmp_path: Path) -> None:
    lines = {
        "import ray._private.worker": "ray._private.worker",
        "from ray._private import state": "ray._private.state",
        "from ray.experimental import internal_kv": "ray.experimental.internal_kv",
        "ray._private.worker": "_private",
        "worker.core_worker._kill()": "_kill",
        "ray.init(**{'_system_config': {}})": "_system_config",
        "importlib.import_module('ray._private.node')": "ray._private.node",
        "rows.context.custom_execution_callback_classes = []": "custom_execution_callback_classes",
    }
    for line, name in lines.items():
        (tmp_path / "module.py").write_text(line)
        assert name in private_uses(tmp_path / "module.py"), line


def test_each_use_names_the_public_way_that_it_waits_for() -> None:
    text = (ROOM / "ray_private.py").read_text()
    assert text.count("Waits for: ") == len(ray_private.__all__)


def test_every_part_of_ray_that_a_local_job_replaces_is_there(caplog: pytest.LogCaptureFixture) -> None:
    with ray_private.light_local_ray():
        assert ray._private.node.Node.start_monitor is ray_private._nothing
    assert ray._private.node.Node.start_monitor is not ray_private._nothing
    assert caplog.messages == [], "Ray has other names: find them"
    assert set(ClusterAutoscaler.__abstractmethods__) == {
        "try_trigger_scaling",
        "on_executor_shutdown",
        "get_total_resources",
    }


def test_a_ray_without_one_of_them_is_started_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr("ray.data._internal.stats._StatsManager.gen_dataset_id_from_stats_actor")
    with ray_private.light_local_ray():
        assert ray._private.node.Node.start_monitor is not ray_private._nothing
    assert "local_ray=plain" in caplog.text


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # Ray Data copies its own deprecated settings
def test_a_fit_is_started_without_actors_that_serve_no_fit() -> None:
    def callbacks(trainer: Any) -> set[str]:
        return {type(callback).__name__ for callback in trainer(print)._create_default_callbacks()}

    left_out = callbacks(TorchTrainer) - callbacks(ray_private.light_trainer(TorchTrainer))
    assert left_out == {"PlacementGroupCleanerCallback", "DatasetsCallback"}, "Ray has other names: find them"


def test_the_core_of_ray_prints_no_errors_of_ray_data_but_what_else_comes_is_printed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    levels = []

    def connect() -> str:
        levels.append(os.environ["RAY_BACKEND_LOG_LEVEL"])
        os.write(2, b"one\n[I] logging.cc: Set ray log level from environment variable X to 3\ntwo\n")
        return "connected"

    monkeypatch.setattr("ray._private.worker.connect", connect)
    with ray_private.quiet_core():
        assert ray._private.worker.connect() == "connected"
    assert ray._private.worker.connect is connect
    assert (levels, "RAY_BACKEND_LOG_LEVEL" in os.environ) == (["fatal"], False)
    assert capfd.readouterr().err == "one\ntwo\n"


def test_a_level_that_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = ray._private.worker.connect
    monkeypatch.setenv("RAY_BACKEND_LOG_LEVEL", "debug")
    with ray_private.quiet_core():
        assert ray._private.worker.connect is connect
