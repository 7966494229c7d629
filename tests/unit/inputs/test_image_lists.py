"""Rows with several images, in a column of lists: the first of each, or each as a row of its own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.config import InputConfig
from captioner.errors import ConfigError
from captioner.inputs import Frozen, Limits, freeze, load_frozen, read_unit, refresh
from captioner.schema import split_key

LISTS = [[b"a", b"b"], [], None, [b"c", None], [b"d", b"e", b"f"]]
EACH = [b"a", b"b", None, None, b"c", None, b"d", b"e", b"f"]
PLACES = ["0-0", "0-1", "1-0", "2-0", "3-0", "3-1", "4-0", "4-1", "4-2"]
FURTHER = "further images of rows (--explode-images takes them)"
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def read(path: Path, run: Path, limits: Limits | None = None, done: Any = None, **config: Any) -> tuple[Frozen, list]:
    access = InputConfig(**config)
    frozen = freeze(str(path), access, str(run))
    assert load_frozen(str(run)) == frozen
    options = {"run_folder": str(run), "limits": limits or Limits(), "done": done}
    tables = [table for unit in frozen.units for table in read_unit(unit, frozen.columns, access, **options)]
    return frozen, [row for table in tables for row in table.to_pylist()]


def write(path: Path, kind: pa.DataType | None = None, **options: Any) -> Path:
    lists = [[{"bytes": item} for item in found or ()] if found else found for found in LISTS]
    images = pa.array(lists if kind and kind.value_type == STRUCT else LISTS, kind or pa.list_(pa.binary()))
    texts = list("vwxyz")
    pq.write_table(
        pa.table({"nested": [{"n": 1}] * 5, "images": images, "text": texts, "id": range(5)}), path, **options
    )
    return path


@pytest.mark.parametrize("rows_per_group", [1, 2, 9])
@pytest.mark.parametrize("kind", [pa.list_(pa.binary()), pa.large_list(pa.large_binary()), pa.list_(STRUCT)], ids=str)
def test_each_image_of_a_row_is_a_row_with_its_other_columns(tmp_path, kind, rows_per_group):
    path = write(tmp_path / "t.parquet", kind, row_group_size=rows_per_group)
    frozen, rows = read(path, tmp_path / "run", explode_images=True, keep_columns=("text",))
    assert [row["data"] for row in rows] == EACH
    assert [split_key(row["key"])[1] for row in rows] == list(range(9))
    assert [row["image_id"] for row in rows] == [f"t.parquet#{place}" for place in PLACES]
    assert "".join(row["text"] for row in rows) == "vvwxyyzzz"
    assert {row["reason"] for row in rows if row["data"] is None} == {"empty"}
    assert (frozen.num_images, frozen.left_out) == (9, {})


def test_without_the_flag_the_first_image_of_each_row_is_read_and_the_others_are_counted(tmp_path):
    frozen, rows = read(write(tmp_path / "t.parquet", row_group_size=2), tmp_path / "run")
    assert [row["data"] for row in rows] == [b"a", None, None, b"c", b"d"]
    assert [row["image_id"] for row in rows] == [f"t.parquet#{row}" for row in range(5)]
    assert frozen.left_out == {FURTHER: 4}


def test_an_id_is_that_of_the_row_and_the_place_in_its_list(tmp_path):
    _, rows = read(write(tmp_path / "t.parquet"), tmp_path / "run", explode_images=True, id_column="id")
    assert [row["image_id"] for row in rows] == PLACES


@pytest.mark.parametrize("rows_per_group", [1, 3])
def test_slices_and_what_is_done_are_places_of_images(tmp_path, rows_per_group):
    path = write(tmp_path / "t.parquet", row_group_size=rows_per_group)
    options = {"explode_images": True, "limits": Limits(start_at=3, stop_at=8)}
    _, rows = read(path, tmp_path / "run", done=np.array([False, True, True, False]), **options)
    assert [row["image_id"] for row in rows] == [f"t.parquet#{place}" for place in ("2-0", "4-0", "4-1")]


def test_lists_that_an_engine_reads_as_fixed_are_read_too(tmp_path):
    images = pa.array([[b"a", b"b"], [b"c", b"d"]], pa.list_(pa.binary(), 2))
    pq.write_table(pa.table({"images": images}), tmp_path / "t.parquet")
    _, rows = read(tmp_path / "t.parquet", tmp_path / "run", explode_images=True)
    assert [row["data"] for row in rows] == [b"a", b"b", b"c", b"d"]


def test_a_file_of_one_image_a_row_stands_beside_one_of_lists(tmp_path):
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"image": [[b"a", b"b"]]}), tmp_path / "in/0.parquet")
    pq.write_table(pa.table({"image": [b"c"]}), tmp_path / "in/1.parquet")
    _, rows = read(tmp_path / "in", tmp_path / "run", explode_images=True)
    assert [(row["image_id"], row["data"]) for row in rows] == [
        ("0.parquet#0-0", b"a"),
        ("0.parquet#0-1", b"b"),
        ("1.parquet#0", b"c"),
    ]


def test_a_plain_column_of_images_is_taken_before_lists_and_bytes_before_names(tmp_path):
    pq.write_table(pa.table({"url": ["x.jpg"], "images": [[b"a"]]}), tmp_path / "plain.parquet")
    assert read(tmp_path / "plain.parquet", tmp_path / "1")[0].columns.image == "url"
    table = pa.table({"images": [["a.jpg"]], "image_bytes": [[b"a"]], "tags": [["x"]]})
    pq.write_table(table, tmp_path / "lists.parquet")
    assert read(tmp_path / "lists.parquet", tmp_path / "2")[0].columns.image == "image_bytes"


def test_uris_in_lists_of_json_are_rows_or_counted(tmp_path):
    rows = [{"images": ["a.jpg", "b.jpg"], "text": "t", "id": "q"}, {"images": [], "id": "r"}, {"images": "c.jpg"}]
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    frozen, found = read(path, tmp_path / "1")
    assert [Path(row["uri"]).name if row["uri"] else None for row in found] == ["a.jpg", None, "c.jpg"]
    assert frozen.left_out == {FURTHER: 1}
    _, found = read(path, tmp_path / "2", explode_images=True, id_column="id", keep_columns=("text",))
    assert [row["image_id"] for row in found][:3] == ["q-0", "q-1", "r-0"]
    assert [row["text"] for row in found] == ["t", "t", None, None]


def test_further_images_are_counted_once_when_the_input_is_refreshed(tmp_path):
    path, run, config = tmp_path / "list.jsonl", str(tmp_path / "run"), InputConfig()
    path.write_text(json.dumps({"images": ["a.jpg", "b.jpg"]}) + "\n")
    frozen = freeze(str(path), config, run)
    with path.open("a") as file:
        file.write(json.dumps({"images": ["c.jpg", "d.jpg", "e.jpg"]}) + "\n")
    grown, _ = refresh(str(path), config, frozen, run)
    assert (frozen.num_further, grown.num_further) == (1, 3)
    assert load_frozen(run) == grown


def test_the_flag_is_refused_where_there_is_no_list(tmp_path):
    pq.write_table(pa.table({"image": [b"a"]}), tmp_path / "t.parquet")
    (tmp_path / "a.csv").write_text("url\na.jpg\n")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jpg").write_bytes(b"x")
    for name, message in (("t.parquet", "binary and no list"), ("a.csv", "string and no list"), ("in", "has no table")):
        with pytest.raises(ConfigError, match=f"--explode-images: .*{message}"):
            read(tmp_path / name, tmp_path / "run", explode_images=True)


def test_a_footer_that_says_fewer_images_than_rows_is_corrupt(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"image": [[b"a"], [b"b"]]}), tmp_path / "in/0.parquet")
    pq.write_table(pa.table({"image": [b"c"]}), tmp_path / "in/1.parquet")
    monkeypatch.setattr("captioner.inputs.freezing.num_images", lambda *_: 1)
    _, rows = read(tmp_path / "in", tmp_path / "run")
    assert [row["reason"] for row in rows] == ["corrupt", None]
