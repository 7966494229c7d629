"""In which number format a table is continued."""

from pathlib import Path
from typing import Any

import pytest

from captioner.captioning.number_format import check_dtype, resolved_dtype
from captioner.config import ModelConfig
from captioner.errors import OutputError
from captioner.tables import CaptionTable
from tests.caption_tables import add_part, begin_table, caption_row, write_images

NEW_GPU: dict[str, Any] = {"model": {"dtype": "bfloat16"}}
OLDER_GPU: dict[str, Any] = {"config": {"model": {"dtype": "auto", "device": "auto"}}, "allocation": {"worker_gpus": 1}}
OLDER_CPU: dict[str, Any] = {"config": {"model": {"dtype": "auto", "device": "auto"}}, "allocation": {"worker_gpus": 0}}
OLDER_NAMED: dict[str, Any] = {"config": {"model": {"dtype": "bfloat16"}}, "allocation": {"worker_gpus": 0}}


@pytest.mark.parametrize(
    ("config", "worker_gpus", "dtype"),
    [
        ({}, 1.0, "bfloat16"),
        ({}, 0.25, "bfloat16"),
        ({}, 0.0, "float32"),
        ({"device": "cpu"}, 1.0, "float32"),
        ({"dtype": "float16"}, 0.0, "float16"),
    ],
)
def test_auto_is_bfloat16_with_a_gpu_and_float32_without(
    config: dict[str, Any], worker_gpus: float, dtype: str
) -> None:
    assert resolved_dtype(ModelConfig(**config), worker_gpus) == dtype


def begun(tmp_path: Path, dtype: str, *records: dict[str, Any]) -> CaptionTable:
    """A table with a caption, and records of runs."""
    images = write_images(tmp_path / "images", 1)
    model = {"name": "demo", "fingerprint": "abc", "dtype": dtype}
    table, _ = begin_table(str(tmp_path / "out"), str(images), identity={"model": model})
    for number, record in enumerate(records):
        table.record(f"run-{number}", record)
    add_part(table, [caption_row(0, "000.jpg", "x")], run_id="run-0")
    return table


@pytest.mark.parametrize("record", [NEW_GPU, OLDER_GPU, OLDER_NAMED])
def test_a_table_of_bfloat16_is_not_continued_in_float32(tmp_path: Path, record: dict[str, Any]) -> None:
    table = begun(tmp_path, "auto", record)
    check_dtype(table, "bfloat16")
    expected = "holds captions computed in bfloat16, and this run would compute in float32.*Pass --dtype bfloat16"
    with pytest.raises(OutputError, match=expected):
        check_dtype(table, "float32")


def test_a_table_whose_first_run_was_on_cpus_is_continued_on_cpus(tmp_path: Path) -> None:
    table = begun(tmp_path, "auto", OLDER_CPU)
    check_dtype(table, "float32")
    with pytest.raises(OutputError, match="computed in float32"):
        check_dtype(table, "bfloat16")


def test_a_table_of_both_or_of_nothing_known_goes_on_in_either(tmp_path: Path) -> None:
    for number, records in enumerate([(OLDER_GPU, OLDER_CPU), ({},), ({"config": []}, {"model": "x"})]):
        table = begun(tmp_path / str(number), "auto", *records)
        for dtype in ("float32", "bfloat16"):
            check_dtype(table, dtype)


def test_a_table_without_captions_is_begun_in_any_format(tmp_path: Path) -> None:
    table = CaptionTable(str(tmp_path / "out"))
    table.record("run-0", NEW_GPU)
    check_dtype(table, "float32")


@pytest.mark.parametrize(("there", "now"), [("auto", "bfloat16"), ("bfloat16", "auto"), ("auto", "auto")])
def test_auto_and_what_it_may_mean_are_no_other_job_before_the_workers_are_known(
    tmp_path: Path, there: str, now: str
) -> None:
    table = begun(tmp_path, there, NEW_GPU)
    identity = table.identity() or {}
    table.refuse_other_job({**identity, "model": {**identity["model"], "dtype": now}})
    check_dtype(table, "bfloat16")
    with pytest.raises(OutputError):
        check_dtype(table, "float16")


def test_two_formats_by_name_are_two_jobs(tmp_path: Path) -> None:
    table = begun(tmp_path, "bfloat16", NEW_GPU)
    identity = table.identity() or {}
    with pytest.raises(OutputError, match=r"model\.dtype: bfloat16 there, float32 now"):
        table.refuse_other_job({**identity, "model": {**identity["model"], "dtype": "float32"}})
