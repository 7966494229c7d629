"""Captions beside the rows of any table, without Ray: what `captioner.caption` runs in its workers."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from captioner.caption_columns import CAPTION_COLUMNS
from captioner.captioning import dataset_worker
from captioner.captioning.dataset_worker import DatasetCaptioner, DatasetOptions, caption_fields, check_columns
from captioner.config import DecodingConfig, ModelConfig
from captioner.errors import InputError
from tests.bundles import save_tiny_bundle
from tests.sample_images import encoded, sample_image

DECODING = DecodingConfig(max_new_tokens=4)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_bundle(tmp_path_factory.mktemp("bundle"))


def options(bundle: str, **changes: Any) -> DatasetOptions:
    return DatasetOptions(**{"column": "image", "model": ModelConfig(model=bundle), "decoding": DECODING} | changes)


@pytest.fixture(scope="module")
def worker(bundle: str) -> DatasetCaptioner:
    return DatasetCaptioner(options(bundle))


def test_each_row_keeps_its_columns_and_gets_a_caption_or_a_reason(worker: DatasetCaptioner) -> None:
    rows = pa.table({"n": [1, 2, 3], "image": [encoded("PNG"), b"<html>", None], "of": [{"a": 1}, None, {"a": 3}]})
    found = worker(rows)
    assert found.select(rows.column_names).equals(rows)
    assert found.column_names[3:] == [*(column.name for column in CAPTION_COLUMNS), "reason", "detail"]
    assert [field.type for field in found.schema][3:] == [field.type for field in caption_fields()]
    assert found["reason"].to_pylist() == [None, "not_an_image", "empty"]
    assert found["caption"].is_valid().to_pylist() == [True, False, False]
    assert found["num_tokens"].to_pylist()[0] > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of Ray's own tensors
def test_images_are_bytes_structs_uris_or_tensors_and_mean_the_same(worker: DatasetCaptioner, tmp_path: Path) -> None:
    from ray.data.extensions import ArrowTensorArray, ArrowVariableShapedTensorArray

    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    pixels = np.asarray(sample_image())
    columns = {
        "bytes": pa.array([encoded("PNG")], pa.large_binary()),
        "struct": pa.array([{"bytes": encoded("PNG"), "path": None}]),
        "struct of a path": pa.array([{"bytes": None, "path": str(tmp_path / "a.png")}]),
        "path": pa.array([str(tmp_path / "a.png")]),
        "url": pa.array([(tmp_path / "a.png").as_uri()]),
        "tensor": ArrowTensorArray.from_numpy(np.stack([pixels])),
        "tensors of several sizes": ArrowVariableShapedTensorArray.from_numpy([pixels]),
    }
    captions = {name: worker(pa.table({"image": column}))["caption"].to_pylist() for name, column in columns.items()}
    assert captions == dict.fromkeys(columns, captions["bytes"])
    assert captions["bytes"] != [None]


def test_a_uri_that_cannot_be_read_is_a_row_with_its_reason(worker: DatasetCaptioner, tmp_path: Path) -> None:
    (tmp_path / "other.png").touch()
    found = worker(pa.table({"image": [str(tmp_path / "gone.png")]}))
    assert found["reason"].to_pylist() == ["missing"]


@pytest.mark.parametrize(
    ("values", "kind"), [([1, 2], "int"), ([[1.0]], "list"), ([[[1.0]]], "list"), ([True], "bool"), ([0.5], "float")]
)
@pytest.mark.parametrize("more", [{}, {"do_sample": True}])
def test_a_column_that_holds_no_images_is_refused(
    worker: DatasetCaptioner, values: list[Any], kind: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_options", replace(worker._options, decoding=replace(DECODING, **more)))
    with pytest.raises(InputError, match=f"^the column image has a {kind}; expected images: texts"):
        worker(pa.table({"image": values}))


def test_images_are_hashed_only_where_a_draw_depends_on_it(
    worker: DatasetCaptioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_worker, "_digest", lambda image: pytest.fail("greedy captions draw nothing"))
    assert worker(pa.table({"image": [encoded("PNG")]}))["caption"].to_pylist() != [None]


def test_a_sampled_caption_does_not_depend_on_its_batch(bundle: str) -> None:
    sampling = DecodingConfig(max_new_tokens=6, do_sample=True, seed=3)
    worker = DatasetCaptioner(options(bundle, decoding=sampling))
    rows = pa.table({"image": [encoded("PNG", seed=seed) for seed in range(6)]})
    together = worker(rows)["caption"].to_pylist()
    assert [worker(rows.slice(place, 1))["caption"].to_pylist()[0] for place in range(6)] == together
    assert len(set(together)) > 1


def test_columns_that_are_missing_or_taken_are_refused(bundle: str) -> None:
    asked = options(bundle, id_column="id")
    for names, text in [
        (["picture", "id"], "the dataset has no column image; expected one of picture, id"),
        (["image"], "the dataset has no column id; expected one of image"),
        (["image", "id", "caption", "reason"], "the dataset has caption, reason already, as captions would be named;"),
    ]:
        with pytest.raises(InputError, match=re.escape(text)):
            check_columns(names, asked)
