"""cluster.yaml and the manifest for KubeRay, held to Ray's schema, the autoscaler's rules and our own command line."""

import copy
import re
import shlex
import tomllib
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli

from captioner.cluster.session import OFF_MODEL_SELECTOR
from captioner.command_line import parse
from captioner.config import CaptionJobConfig, PlanConfig

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "cluster.yaml").read_text()
GUIDE = (ROOT / "jobs" / "guide" / "cluster.md").read_text()
PLACEHOLDER = re.compile(r"FILL-IN[\w-]*")
[LABEL] = OFF_MODEL_SELECTOR
ray_commands = cli.commands


def filled(text: str) -> dict[str, Any]:
    """The config once its user has filled in what only he knows."""
    config: dict[str, Any] = yaml.safe_load(PLACEHOLDER.sub("known", text))
    return config


def node_types() -> dict[str, Any]:
    found: dict[str, Any] = filled(TEXT)["available_node_types"]
    return found


def test_the_config_is_valid_by_rays_own_schema_once_it_is_filled_in() -> None:
    validate_config(prepare_config(copy.deepcopy(filled(TEXT))))


def test_every_line_that_misses_something_is_marked_and_no_other_one() -> None:
    lines = [line for line in TEXT.splitlines() if not line.startswith("#")]
    marked = {number for number, line in enumerate(lines) if "# FILL IN" in line}
    missing = {number for number, line in enumerate(lines) if PLACEHOLDER.search(line.partition("#")[0])}
    assert marked == missing != set()


def test_nodes_with_a_gpu_and_no_others_carry_the_label_that_keeps_decoding_off() -> None:
    for kind in node_types().values():
        is_kept_off = kind.get("labels", {}).get(LABEL) == "model"
        assert is_kept_off == ("GPU" in kind["resources"])


def test_every_ray_command_that_a_node_runs_is_one_of_rays_with_options_that_it_takes() -> None:
    config = filled(TEXT)
    lines = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    commands = [words for line in lines for words in re.findall(r"(?:^|\s)ray (\w+)([^;&]*)", line)]
    assert {name for name, _ in commands} == {"start", "stop"}
    for name, arguments in commands:
        known = {option for parameter in ray_commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", arguments)) <= known


def test_what_a_node_installs_is_there() -> None:
    [line] = [line for line in filled(TEXT)["setup_commands"] if "pip install" in line]
    [[constraints, extra]] = re.findall(r"-c ~/captioner/(\S+) '/home/ubuntu/captioner\[(\w+)\]'", line)
    assert (ROOT / constraints).exists()
    assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_all_nodes_may_come_at_once() -> None:
    config = filled(TEXT)
    assert config["max_workers"] == sum(kind.get("max_workers", 0) for kind in config["available_node_types"].values())
    assert config["upscaling_speed"] >= max(kind.get("max_workers", 0) for kind in node_types().values())


def test_what_git_ignores_is_not_copied_to_every_node() -> None:
    ignored = {line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    patterns = filled(TEXT)["rsync_exclude"]
    for name in ignored - {"*.egg-info", "captions-demo.html"}:  # small, and needed by no one
        assert any(fnmatch(name, pattern.removeprefix("**/")) for pattern in patterns), name


def manifest() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "jobs" / "kuberay.yaml").read_text())
    return found


def test_the_manifest_is_a_job_whose_entrypoint_our_command_line_takes() -> None:
    job = manifest()
    assert (job["kind"], job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"]) == ("RayJob", True)
    python, script, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert (python, (ROOT / script).exists()) == ("python", True)
    assert parse(CaptionJobConfig, arguments).resources.gpus_per_worker == 1
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == version("ray")


def test_pods_with_a_gpu_and_no_others_carry_the_label_that_keeps_decoding_off() -> None:
    for group in manifest()["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        [container] = group["template"]["spec"]["containers"]
        is_kept_off = group.get("labels", {}).get(LABEL) == "model"
        assert is_kept_off == ("nvidia.com/gpu" in container["resources"]["limits"])


def test_the_guide_submits_what_our_command_line_takes() -> None:
    lines = re.findall(r"^ray job submit .* -- python (\S+) (.*)$", GUIDE, re.MULTILINE)
    entrypoints = {script: shlex.split(arguments) for script, arguments in lines}
    assert parse(CaptionJobConfig, entrypoints.pop("jobs/caption.py")).resources.workers == "1:64"
    assert parse(PlanConfig, entrypoints.pop("jobs/plan.py")).output == "s3://out"
    assert not entrypoints
