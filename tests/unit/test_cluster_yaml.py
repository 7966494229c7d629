"""cluster.yaml and the README's manifest, held to Ray's schema, the autoscaler's rules and our own command line."""

import copy
import re
import shlex
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from captioner.command_line import parse
from captioner.config import CaptionJobConfig, PlanConfig

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "cluster.yaml").read_text()
README = (ROOT / "README.md").read_text()
PLACEHOLDER = re.compile(r"FILL-IN[\w-]*")


def filled(text: str) -> dict[str, Any]:
    """The config once its user has filled in what only he knows."""
    config: dict[str, Any] = yaml.safe_load(PLACEHOLDER.sub("known", text))
    return config


def node_types() -> dict[str, Any]:
    found: dict[str, Any] = filled(TEXT)["available_node_types"]
    return found


def test_the_config_is_valid_by_rays_own_schema_once_it_is_filled_in() -> None:
    validate_config(prepare_config(copy.deepcopy(filled(TEXT))))


def test_the_schema_is_really_asked() -> None:
    config = filled(TEXT)
    config["available_node_types"]["decode"]["resources"]["CPU"] = "many"
    with pytest.raises(Exception, match="many"):
        validate_config(prepare_config(config))


def test_every_line_that_misses_something_is_marked_and_no_other_one() -> None:
    lines = [line for line in TEXT.splitlines() if not line.startswith("#")]
    marked = {number for number, line in enumerate(lines) if "# FILL IN" in line}
    missing = {number for number, line in enumerate(lines) if PLACEHOLDER.search(line.partition("#")[0])}
    assert marked == missing
    assert len(marked) == 4


def test_the_head_runs_no_work_and_outlives_a_spot_interruption() -> None:
    head = node_types()["head"]
    assert head["resources"]["CPU"] == 0
    assert "InstanceMarketOptions" not in head["node_config"]


@pytest.mark.parametrize("name", ["decode", "model"])
def test_workers_are_spot_and_grow_from_nothing(name: str) -> None:
    kind = node_types()[name]
    assert kind["min_workers"] == 0
    assert kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "IamInstanceProfile" in kind["node_config"]


def test_gpu_nodes_carry_the_label_that_keeps_decoding_off_them() -> None:
    labels = {name: kind.get("labels", {}).get("captioner-stage") for name, kind in node_types().items()}
    gpus = {name for name, kind in node_types().items() if kind["resources"].get("GPU")}
    assert {name for name, label in labels.items() if label == "model"} == gpus == {"model"}


def test_all_nodes_may_come_at_once() -> None:
    config = filled(TEXT)
    assert config["max_workers"] == sum(kind.get("max_workers", 0) for kind in config["available_node_types"].values())
    assert config["upscaling_speed"] >= max(kind.get("max_workers", 0) for kind in node_types().values())


def test_nodes_install_what_the_tests_ran_with_and_keep_weights_on_their_disk() -> None:
    commands = "\n".join(filled(TEXT)["setup_commands"])
    assert "-c ~/captioner/constraints.txt '/home/ubuntu/captioner[cluster]'" in commands
    assert filled(TEXT)["file_mounts"] == {"/home/ubuntu/captioner": "."}
    assert "CAPTIONER_CACHE=" in commands


def test_no_node_is_shut_out_by_a_token_that_a_local_ray_has_left_on_the_head() -> None:
    assert all("RAY_AUTH_MODE=disabled" in line for line in filled(TEXT)["setup_commands"] if ".bashrc" in line)


def test_what_git_ignores_is_not_copied_to_every_node() -> None:
    ignored = {line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    patterns = filled(TEXT)["rsync_exclude"]
    for name in ignored - {"*.egg-info", "captions-demo.html"}:  # small, and needed by no one
        assert any(fnmatch(name, pattern.removeprefix("**/")) for pattern in patterns), name


def test_apt_waits_for_the_updates_of_a_fresh_machine() -> None:
    commands = [line for line in filled(TEXT)["setup_commands"] if "apt-get" in line]
    assert commands
    for part in re.findall(r"apt-get .*?(?= &&|$)", "\n".join(commands), re.MULTILINE):
        assert "DPkg::Lock::Timeout=" in part


def manifest() -> dict[str, Any]:
    [text] = re.findall(r"^```yaml\n(apiVersion: ray.io/v1\n.*?)^```", README, re.MULTILINE | re.DOTALL)
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def test_the_manifest_is_a_job_whose_entrypoint_our_command_line_takes() -> None:
    job = manifest()
    assert (job["kind"], job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"]) == ("RayJob", True)
    python, script, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert (python, (ROOT / script).exists()) == ("python", True)
    config = parse(CaptionJobConfig, arguments)
    assert (config.resources.workers, config.resources.gpus_per_worker) == ("1:64", 1)
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"]) == {"working_dir": "/captioner"}


def test_the_manifest_grows_from_nothing_and_keeps_decoding_off_gpu_pods() -> None:
    cluster = manifest()["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == version("ray")
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert {name: (group["minReplicas"], group["maxReplicas"]) for name, group in groups.items()} == {
        "decode": (0, 16),
        "model": (0, 64),
    }
    for name, group in groups.items():
        [container] = group["template"]["spec"]["containers"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (name == "model")
        assert group.get("labels", {}) == ({"captioner-stage": "model"} if name == "model" else {})


def test_the_readme_submits_what_our_command_line_takes() -> None:
    lines = re.findall(r"^ray job submit .* -- python (\S+) (.*)$", README, re.MULTILINE)
    entrypoints = {script: shlex.split(arguments) for script, arguments in lines}
    assert parse(CaptionJobConfig, entrypoints.pop("jobs/caption.py")).resources.workers == "1:64"
    assert parse(PlanConfig, entrypoints.pop("jobs/plan.py")).output == "s3://out"
    assert not entrypoints
