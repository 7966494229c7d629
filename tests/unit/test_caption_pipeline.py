"""What the Ray side of the job makes of a worker's error; the job itself is in tests/integration."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow as pa
import pytest

from captioner.caption_pipeline import caption_images, check_device, cluster_of, joined_cluster, one_table
from captioner.config import CaptionJobConfig, ResourceConfig, VerifyConfig
from captioner.errors import ConfigError, JobError, OutputError
from captioner.resources import Cluster, allocate
from captioner.rows import RejectReason
from captioner.sources.faults import Fault, StoreError
from captioner.tables import CaptionTable
from captioner.tracebacks import error_in
from captioner.verification import verify

TRACEBACK = """ray::MapWorker(MapBatches(CaptionWorker)).__init__() (pid=29611, ip=192.0.2.2)
  File "captioner/decoding/engine.py", line 86, in __init__
    _check_slots(slots, group_size)
"""


def test_anerror_in_keeps_its_kind_and_its_words_across_ray() -> None:
    error = error_in(TRACEBACK + "captioner.errors.ConfigError: --slots is 2; expected at least 4")
    assert isinstance(error, ConfigError)
    assert str(error) == "--slots is 2; expected at least 4"


def test_an_error_of_several_lines_keeps_them_and_leaves_rays_own_words_behind() -> None:
    text = (
        TRACEBACK + "captioner.errors.OutputError: these differ:\n  model: a there, b now\n\nray.exceptions.UserCode: x"
    )
    error = error_in(text)
    assert isinstance(error, OutputError)
    assert str(error) == "these differ:\n  model: a there, b now"


@pytest.mark.parametrize("last", ["torch.OutOfMemoryError: CUDA out of memory", "OSError: disk full"])
def test_any_other_error_becomes_a_job_error_that_names_it(last: str) -> None:
    error = error_in(TRACEBACK + last)
    assert isinstance(error, JobError)
    assert str(error) == f"the job stopped: {last}"


def test_the_wrapper_that_ray_puts_around_a_stage_does_not_hide_the_cause() -> None:
    cause = "pyarrow.lib.ArrowNotImplementedError: no kernel\n\nThe above exception was the direct cause of this:\n\n"
    error = error_in(TRACEBACK + cause + "ray.exceptions.UserCodeException: UDF failed to process a data block.")
    assert str(error) == "the job stopped: pyarrow.lib.ArrowNotImplementedError: no kernel"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("", "no local Ray could be started: timed out during startup; expected a machine with CPU and memory"),
        ("127.0.0.1:1", "the cluster of RAY_ADDRESS, 127.0.0.1:1, was not joined: timed out .*; expected a head"),
    ],
)
def test_a_ray_that_does_not_start_is_an_error_of_ours_that_says_what_was_tried(
    monkeypatch: pytest.MonkeyPatch, address: str, expected: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.init", Mock(side_effect=Exception("timed out\nduring startup")))
    with pytest.raises(JobError, match=expected), joined_cluster():
        pass


def test_a_device_that_no_worker_gets_is_refused_before_a_worker_starts() -> None:
    without = allocate(ResourceConfig(), Cluster(cpus=2, gpus=0))
    with pytest.raises(ConfigError, match="--device is cuda:0, but the workers get no GPU"):
        check_device("cuda:0", without)
    check_device("cuda", allocate(ResourceConfig(), Cluster(cpus=2, gpus=1)))
    check_device("auto", without)


def test_the_cpus_of_gpu_nodes_do_not_decode_and_dead_nodes_have_nothing() -> None:
    def node(stage: str, *, alive: bool = True, **resources: float) -> dict[str, Any]:
        return {"Alive": alive, "Labels": {"captioner-stage": stage}, "Resources": resources}

    nodes = [node("decode", CPU=32.0), node("model", CPU=16.0, GPU=1.0), node("model", alive=False, GPU=8.0)]
    found = cluster_of([*nodes, {"Alive": True, "Labels": {}, "Resources": {"CPU": 4.0, "GPU": 2.0}}], can_grow=False)
    assert found == Cluster(cpus=36, gpus=3, node_cpus=(32, 4), node_gpus=(1, 2))


def test_blocks_of_no_rows_have_no_columns_and_spoil_nothing() -> None:
    empty, rows = pa.table({}), pa.table({"key": [1]})
    assert one_table([empty, rows, empty, rows]) == pa.table({"key": [1, 1]})
    assert one_table([empty, empty]) is None


def test_an_error_without_a_name_is_still_told() -> None:
    assert str(error_in("The node died.")) == "the job stopped: The node died."


def test_an_output_that_cannot_be_reached_is_wrong_use_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jpg").touch()
    fault = Fault(RejectReason.FORBIDDEN, "NoCredentialsError: Unable to locate credentials")
    monkeypatch.setattr(CaptionTable, "identity", Mock(side_effect=StoreError(fault)))
    with pytest.raises(OutputError, match=r"output s3://b/out cannot be read or written: NoCredentialsError"):
        caption_images(CaptionJobConfig(input_path=str(tmp_path), output="s3://b/out"))
    with pytest.raises(OutputError, match=r"output s3://b/out cannot be read or written: NoCredentialsError"):
        verify(VerifyConfig(table="s3://b/out"))
