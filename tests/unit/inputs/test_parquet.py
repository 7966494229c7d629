import base64
import re
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.config import InputConfig
from captioner.errors import InputError
from captioner.inputs import Limits, blocks, freeze, parquet, read_unit
from captioner.inputs.slices import cut
from captioner.schema import source_schema, split_key
from captioner.storage import SteadyFile, open_store
from captioner.storage.faults import Fault, StoreError


@pytest.fixture
def run(tmp_path):
    return str(tmp_path / "out/_run")


def _write(path, table, **options):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), path, **options)
    return str(path)


def _tables(path, run, config=InputConfig(), **options):  # noqa: B008
    frozen = freeze(str(path), config, run)
    return [t for unit in frozen.units for t in read_unit(unit, frozen.columns, config, run_folder=run, **options)]


def _rows(*args, **options):
    tables = _tables(*args, **options)
    return pa.concat_tables(tables).to_pylist() if tables else []


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.binary(2), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())]
)
def test_a_column_of_bytes_is_the_image_whatever_its_layout(tmp_path, run, kind):
    images = pa.array([b"aa", b"bb", None, b"aa"], pa.binary()).cast(kind)
    path = _write(tmp_path / "t.parquet", {"id": [1, 2, 3, 4], "image": images})
    rows = _rows(path, run)
    assert [row["data"] for row in rows] == [b"aa", b"bb", None, b"aa"]
    assert [row["image_id"] for row in rows] == [f"t.parquet#{n}" for n in range(4)]
    assert (rows[2]["reason"], rows[2]["detail"]) == ("empty", "null in column image")


def test_images_as_text_are_decoded_and_are_never_an_id(tmp_path, run):
    image = bytes(range(256)) * 2
    jpeg = base64.b64encode(b"\xff\xd8\xff\xe0" + image).decode()
    texts = [
        f"data:image/png;base64,{base64.b64encode(image).decode()}",
        jpeg,
        "data:,a%20b",
        f"{jpeg}=x",
        "a.jpg",
        None,
    ]
    rows = _rows(_write(tmp_path / "t.parquet", {"image": texts}), run)
    assert [row["data"] for row in rows] == [image, base64.b64decode(jpeg), b"a b", f"{jpeg}=x".encode(), None, None]
    assert [row["image_id"] for row in rows] == [*(f"t.parquet#{n}" for n in range(4)), "a.jpg", "t.parquet#5"]
    assert [row["uri"] for row in rows] == [None] * 4 + [f"{tmp_path}/a.jpg", None]


def test_views_are_kept_as_plain_strings_and_continued_as_any_column(tmp_path, run):
    columns = {"image": pa.array([b"aa", b"bb"], pa.binary_view()), "text": pa.array(["x", "y"], pa.string_view())}
    path = _write(tmp_path / "t.parquet", columns)
    (table,) = _tables(path, run, config=InputConfig(keep_columns=("text",)), done=np.array([True, False]))
    assert (table["data"].to_pylist(), table["text"].to_pylist()) == ([b"bb"], ["y"])
    assert table.schema.field("text").type == pa.string()


def test_hugging_faces_struct_gives_its_bytes_or_else_its_path(tmp_path, run):
    images = [
        {"bytes": b"a", "path": "a.jpg"},
        {"bytes": None, "path": "sub/b.jpg"},
        {"bytes": None, "path": "s3://b/c.jpg"},
        {"bytes": b"", "path": None},
        {"bytes": None, "path": None},
        None,
    ]
    rows = _rows(_write(tmp_path / "t.parquet", {"image": images, "label": range(6)}), run)
    assert [row["data"] for row in rows] == [b"a", None, None, None, None, None]
    assert [row["uri"] for row in rows] == [None, f"{tmp_path}/sub/b.jpg", "s3://b/c.jpg", None, None, None]
    assert [row["reason"] for row in rows] == [None, None, None, "empty", "empty", "empty"]
    ids = ["a.jpg", "sub/b.jpg", "s3://b/c.jpg", "t.parquet#3", "t.parquet#4", "t.parquet#5"]
    assert [row["image_id"] for row in rows] == ids


def test_a_column_of_uris_is_followed_from_the_tables_own_folder(tmp_path, run):
    table = {"url": ["a b.jpg", "https://u:p@h/x.jpg", "", None], "text": ["1", "2", "3", "4"]}
    rows = _rows(_write(tmp_path / "t.parquet", table), run)
    assert [row["uri"] for row in rows] == [f"{tmp_path}/a b.jpg", "https://u:p@h/x.jpg", None, None]
    assert [row["image_id"] for row in rows] == ["a b.jpg", "https://***@h/x.jpg", "t.parquet#2", "t.parquet#3"]
    assert [row["reason"] for row in rows] == [None, None, "empty", "empty"]


def test_a_null_id_falls_back_and_equal_ids_stay_apart_by_their_keys(tmp_path, run):
    path = _write(tmp_path / "t.parquet", {"image": [b"a", b"b", b"c"], "n": [7, None, 7]})
    rows = _rows(path, run, InputConfig(id_column="n"))
    assert [row["image_id"] for row in rows] == ["7", "t.parquet#1", "7"]
    assert [split_key(row["key"]) for row in rows] == [(0, 0), (0, 1), (0, 2)]


def test_kept_columns_keep_type_and_order_and_take_their_new_names(tmp_path, run):
    table = pa.table(
        {
            "image": [b"a", b"b"],
            "tags": [["x"], None],
            "score": pa.array([0.5, None], pa.float32()),
            "kind": pa.array(["p", "q"]).dictionary_encode(),
            "void": pa.nulls(2),
        }
    )
    config = InputConfig(keep_columns=("kind", "score=clip", "tags", "void"))
    tables = _tables(_write(tmp_path / "t.parquet", table), run, config)
    kept = [("kind", pa.string()), ("clip", pa.float32()), ("tags", pa.list_(pa.string())), ("void", pa.string())]
    assert tables[0].schema == source_schema([pa.field(*field) for field in kept])
    assert [list(row.values())[-4:] for row in tables[0].to_pylist()] == [
        ["p", 0.5, ["x"], None],
        ["q", None, None, None],
    ]


def test_kept_columns_of_several_tables_get_a_type_that_holds_them_all(tmp_path, run):
    _write(tmp_path / "in/0.parquet", {"image": [b"a"], "n": pa.array([1], pa.int32()), "s": ["x"]})
    _write(tmp_path / "in/1.parquet", {"image": [b"b"], "n": pa.array([2**40], pa.int64())})
    rows = _rows(tmp_path / "in", run, InputConfig(keep_columns=("n", "s")))
    assert [(row["n"], row["s"]) for row in rows] == [(1, "x"), (2**40, None)]


def test_kept_columns_that_no_type_holds_are_an_error_that_names_both(tmp_path, run):
    _write(tmp_path / "in/0.parquet", {"image": [b"a"], "n": [1]})
    _write(tmp_path / "in/1.parquet", {"image": [b"b"], "n": ["x"]})
    with pytest.raises(InputError, match=r"n is int64 in 0.parquet and string in 1.parquet; expected one type"):
        freeze(str(tmp_path / "in"), InputConfig(keep_columns=("n",)), run)


def test_a_table_without_the_image_column_is_one_reject(tmp_path, run):
    _write(tmp_path / "in/0.parquet", {"image": [b"a"]})
    _write(tmp_path / "in/1.parquet", {"label": [1, 2, 3]})
    rows = _rows(tmp_path / "in", run)
    assert [(row["image_id"], row["reason"]) for row in rows] == [("0.parquet#0", None), ("1.parquet", "unsupported")]
    assert rows[1]["detail"] == "no column image, as other files have; columns: label"


def test_text_that_is_not_utf8_is_shown_and_not_passed_on(tmp_path, run):
    """Arrow writes and reads such strings unchecked; whoever turns them into Python's fails."""
    names = pa.array([b"a", b"\xff"]).view(pa.binary()).cast(pa.binary())
    bad = pa.Array.from_buffers(pa.string(), 2, names.buffers())
    path = _write(tmp_path / "t.parquet", {"image": [b"1", b"2"], "id": bad, "note": bad})
    rows = _rows(path, run, InputConfig(id_column="id", keep_columns=("note",)))
    assert [(row["image_id"], row["note"]) for row in rows] == [("a", "a"), (r"\xff", r"\xff")]


# -- which column


@pytest.mark.parametrize(
    ("columns", "config", "message"),
    [
        (
            {"a": [1], "b": ["x"]},
            {},
            r"no column that can be the image; name one with --image-column. Columns: a",
        ),
        ({"a": [b"1"], "b": [b"2"]}, {}, r"several columns that can be the image.*Candidates: a: binary, b: binary"),
        ({"url": ["1"], "path": ["2"]}, {}, r"several columns.*Candidates: url: string, path: string"),
        (
            {"image": [b"1"]},
            {"image_column": "imege"},
            r"imege: .* no such column. Did you mean image\?",
        ),
        ({"a": [[[b"1"]]]}, {"image_column": "a"}, r"is list<.*>; expected binary, .* or a list of one of these"),
        ({"a": [{"x": 1}]}, {"image_column": "a"}, r"is struct<x: int64>; expected binary"),
        ({"image": [b"1"], "uid": [1]}, {"id_column": "id"}, r"--id-column id: .* no such column. Did you mean uid\?"),
        ({"image": [b"1"], "id": [[1]]}, {"id_column": "id"}, r"--id-column id of .* is list<.*>; expected a string"),
        ({"image": [b"1"], "text": ["x"]}, {"keep_columns": ("txt",)}, r"--keep-columns txt: .* Did you mean text\?"),
    ],
)
def test_a_column_that_cannot_be_chosen_is_an_error_with_the_columns(tmp_path, run, columns, config, message):
    path = _write(tmp_path / "t.parquet", columns)
    with pytest.raises(InputError, match=message):
        freeze(path, InputConfig(**config), run)


@pytest.mark.parametrize(
    ("columns", "chosen"),
    [
        ({"jpg": [b"1"], "url": ["x"]}, "jpg"),
        ({"Image_URL": ["x"], "caption": ["y"]}, "Image_URL"),
        ({"anything": ["x"]}, "anything"),
        ({"a.b": [b"1"], "c": [1]}, "a.b"),
    ],
)
def test_the_only_column_that_can_be_an_image_is_it(tmp_path, run, columns, chosen):
    path = _write(tmp_path / "t.parquet", columns)
    frozen = freeze(path, InputConfig(), run)
    assert frozen.columns.image == chosen
    assert len(_rows(path, run)) == 1


# -- blocks, resume, limits


def test_blocks_hold_no_more_rows_and_bytes_than_they_may(tmp_path, run, monkeypatch):
    monkeypatch.setattr(blocks, "MAX_BLOCK_BYTES", 100_000)
    images = [b"x" * size for size in [10] * 700 + [40_000] * 20 + [300_000, 10, 10]]
    path = _write(tmp_path / "t.parquet", {"image": images}, row_group_size=100)
    tables = _tables(path, run, limits=Limits(rows_per_block=256))
    assert [value for table in tables for value in table["data"].to_pylist()] == images
    assert [table.num_rows for table in tables][:2] == [200, 200]  # of three row groups, the third would be too many
    assert all(table.nbytes <= 100_000 or table.num_rows == 1 for table in tables)
    keys = [key for table in tables for key in table["key"].to_pylist()]
    assert keys == list(range(723))


def test_done_rows_are_left_out_and_their_row_groups_are_not_read(tmp_path, run, monkeypatch):
    images = [np.random.default_rng(n).bytes(50_000) for n in range(40)]
    path = _write(tmp_path / "t.parquet", {"image": images}, row_group_size=10, compression="none")
    frozen = freeze(path, InputConfig(), run)
    read = []
    plain = SteadyFile.read
    monkeypatch.setattr(SteadyFile, "read", lambda self, size=-1: read.append(size) or plain(self, size))
    done = np.ones(35, dtype=bool)
    done[[3, 31]] = False
    tables = list(read_unit(frozen.units[0], frozen.columns, InputConfig(), run_folder=run, done=done))
    keys = [key for table in tables for key in table["key"].to_pylist()]
    assert keys == [3, 31, 35, 36, 37, 38, 39]
    assert sum(read) < 1_200_000  # two groups of four, half a megabyte each


def test_reading_stops_where_it_is_told(tmp_path, run):
    path = _write(tmp_path / "t.parquet", {"image": [bytes([n]) for n in range(30)]}, row_group_size=10)
    assert [row["key"] for row in _rows(path, run, limits=Limits(stop_at=13))] == list(range(13))


def test_an_image_larger_than_allowed_is_a_reject_and_not_held(tmp_path, run):
    path = _write(tmp_path / "t.parquet", {"image": [b"x" * 11, b"x" * 10]})
    rows = _rows(path, run, limits=Limits(max_image_bytes=10))
    assert [(row["reason"], row["data"]) for row in rows] == [("too_large", None), (None, b"x" * 10)]
    assert rows[0]["detail"] == "11 bytes; --max-image-bytes is 10"


# -- what is broken


def test_an_unreadable_table_among_good_ones_is_one_reject(tmp_path, run):
    _write(tmp_path / "in/0.parquet", {"image": [b"a"]})
    (tmp_path / "in/1.parquet").write_bytes(b"not a table at all")
    (tmp_path / "in/2.parquet").write_bytes(b"")
    rows = _rows(tmp_path / "in", run)
    assert [(row["image_id"], row["reason"]) for row in rows[1:]] == [
        ("1.parquet", "corrupt"),
        ("2.parquet", "corrupt"),
    ]
    assert "not a Parquet file" in rows[1]["detail"]


def test_tables_that_are_all_unreadable_are_an_error(tmp_path, run):
    (tmp_path / "0.parquet").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"none of its 1 files can be read; the first is corrupt: not a Parquet file"):
        freeze(str(tmp_path / "0.parquet"), InputConfig(), run)


def test_a_damaged_row_group_costs_its_own_rows_only(tmp_path, run):
    images = [np.random.default_rng(n).bytes(1000) for n in range(30)]
    path = _write(
        tmp_path / "t.parquet", {"image": images}, row_group_size=10, use_dictionary=False, compression="none"
    )
    frozen = freeze(path, InputConfig(), run)
    data = bytearray(Path(path).read_bytes())
    offset = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data[offset : offset + 40] = b"\xff" * 40
    Path(path).write_bytes(data)
    tables = list(read_unit(frozen.units[0], frozen.columns, InputConfig(), run_folder=run))
    rows = pa.concat_tables(tables).to_pylist()
    assert [row["key"] for row in rows] == list(range(30))
    assert [row["reason"] for row in rows] == [None] * 10 + ["corrupt"] * 10 + [None] * 10
    assert "row group 1" in rows[10]["detail"]


def test_a_table_that_changed_since_it_was_frozen_costs_the_rows_that_are_left_of_it(tmp_path, run):
    path = _write(tmp_path / "t.parquet", {"image": [b"a"]})
    frozen = freeze(path, InputConfig(), run)
    _write(path, {"image": [b"a", b"b"]})
    [table] = read_unit(frozen.units[0], frozen.columns, InputConfig(), run_folder=run)
    [row] = table.to_pylist()
    assert (row["image_id"], row["reason"]) == ("t.parquet#0", "changed")
    assert re.match(r"changed since the job began: it has 2 rows and \d+ bytes, not 1 and \d+; ", row["detail"])


def test_a_table_that_is_gone_may_come_back(tmp_path, run):
    path = _write(tmp_path / "t.parquet", {"image": [b"a", b"b"]})
    frozen = freeze(path, InputConfig(), run)
    Path(path).unlink()
    tables = list(read_unit(frozen.units[0], frozen.columns, InputConfig(), run_folder=run))
    assert [row["reason"] for row in pa.concat_tables(tables).to_pylist()] == ["fetch_failed", "fetch_failed"]


def test_a_store_that_stops_delivering_leaves_the_rest_for_another_run(tmp_path, run, monkeypatch):
    path = _write(
        tmp_path / "t.parquet",
        {"image": [np.random.default_rng(n).bytes(10_000) for n in range(30)]},
        row_group_size=10,
    )
    frozen = freeze(path, InputConfig(), run)
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    plain = SteadyFile._read_once

    def fail(self, wanted):
        if start <= self._position < start + 100:
            raise StoreError(Fault("fetch_failed", "HTTP 503"))
        return plain(self, wanted)

    monkeypatch.setattr(SteadyFile, "_read_once", fail)
    tables = list(read_unit(frozen.units[0], frozen.columns, InputConfig(), run_folder=run))
    rows = pa.concat_tables(tables).to_pylist()
    assert [row["key"] for row in rows] == list(range(30))
    assert [row["reason"] for row in rows] == [None] * 10 + ["fetch_failed"] * 20
    assert rows[10]["detail"] == "HTTP 503"


def test_a_table_without_rows_is_an_error_alone_and_nothing_beside_others(tmp_path, run):
    _write(tmp_path / "in/0.parquet", {"image": pa.array([], pa.binary())})
    with pytest.raises(InputError, match="has no rows"):
        freeze(str(tmp_path / "in"), InputConfig(), run)
    _write(tmp_path / "in/1.parquet", {"image": [b"a"]})
    assert [split_key(row["key"]) for row in _rows(tmp_path / "in", run)] == [(1, 0)]


def test_braces_name_tables_and_one_that_is_missing_is_a_reject(tmp_path, run):
    _write(tmp_path / "t-0.parquet", {"image": [b"a"]})
    rows = _rows(f"{tmp_path}/t-{{0..1}}.parquet", run)
    assert [(row["image_id"], row["reason"]) for row in rows] == [("t-0.parquet#0", None), ("t-1.parquet", "missing")]


DIES_AT_ROW_5 = """
import os, signal, sys
import pyarrow.parquet as pq
from captioner.config import InputConfig
from captioner.inputs import freeze, read_unit

def iter_batches(file, *, row_groups, **options):
    for number, batch in enumerate(READ(file, row_groups=row_groups, **options | {"batch_size": 2})):
        if (row_groups, number) == ([1], 1):
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch

READ, pq.ParquetFile.iter_batches = pq.ParquetFile.iter_batches, iter_batches
frozen = freeze(sys.argv[1], InputConfig(), sys.argv[2])
[unit] = frozen.units
for table in read_unit(unit, frozen.columns, InputConfig(), run_folder=sys.argv[2]):
    for row in table.to_pylist():
        print(row["key"], row["data"], row["reason"], row["detail"])
"""


def test_rows_that_end_every_process_that_reads_them_are_given_up(tmp_path, run, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    images = [f"image {row}".encode() for row in range(9)]
    path = _write(tmp_path / "t.parquet", {"image": pa.array(images)}, row_group_size=3)
    reading = [sys.executable, "-c", DIES_AT_ROW_5, path, run]
    ends = [subprocess.run(reading, capture_output=True, text=True, check=False) for _ in range(4)]
    assert [end.returncode for end in ends] == [-9, -9, -9, 0]
    lines = ends[-1].stdout.splitlines()
    assert lines[:5] == [f"{row} {images[row]} None None" for row in range(5)]
    assert lines[5] == "5 None out_of_memory row group 1: reading row 5 ended 3 processes"
    assert lines[6:] == [f"{row} {images[row]} None None" for row in range(6, 9)]
    assert not list(tmp_path.glob("captioner-reading-*/*"))


def test_image_columns_of_other_types_in_later_files_are_read_or_named(tmp_path, run):
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.null())])
    images = {
        "0": pa.array([b"0"]),
        "1": pa.array([{"bytes": b"1", "path": None}], struct),
        "2": pa.array(["c.jpg"]),
        "3": pa.nulls(1),
        "4": pa.array([[b"4"]]),
        "5": pa.array([5]),
    }
    for name, column in images.items():
        _write(tmp_path / f"in/{name}.parquet", {"image": column})
    rows = _rows(tmp_path / "in", run)
    assert [row["data"] for row in rows] == [b"0", b"1", None, None, b"4", None]
    assert rows[2]["uri"] == f"{tmp_path}/in/c.jpg"
    assert [row["reason"] for row in rows] == [None, None, None, "empty", None, "unsupported"]
    assert "column image is int64; expected binary, struct<bytes, path>, a string or a list" in rows[5]["detail"]


@pytest.mark.parametrize(
    ("fields", "value", "expected"),
    [
        ([("bytes", pa.binary()), ("path", pa.null())], {"bytes": b"1"}, (b"1", None)),
        ([("bytes", pa.null()), ("path", pa.string())], {"path": "/a.jpg"}, (None, "/a.jpg")),
    ],
    ids=["path", "bytes"],
)
def test_a_field_of_type_null_is_a_field_without_values(tmp_path, run, fields, value, expected):
    path = _write(tmp_path / "t.parquet", {"image": pa.array([value], pa.struct(fields))})
    [row] = _rows(path, run)
    assert (row["data"], row["uri"]) == expected


@pytest.mark.parametrize("order", [("0", "1"), ("1", "0")])
def test_a_column_without_values_in_one_file_has_the_type_of_the_others(tmp_path, run, order):
    empty, full = order
    _write(tmp_path / f"in/{empty}.parquet", {"image": pa.nulls(1), "tags": pa.nulls(1), "more": pa.nulls(1)})
    _write(tmp_path / f"in/{full}.parquet", {"image": [b"a"], "tags": [["a", "b"]], "more": pa.nulls(1)})
    (first, second) = _tables(tmp_path / "in", run, InputConfig(keep_columns=("tags", "more")))
    assert first.schema == second.schema
    assert first.schema.field("tags").type == pa.list_(pa.string())
    assert first.schema.field("more").type == pa.string()


def test_hashes_beside_a_url_are_not_the_image(tmp_path, run):
    path = _write(tmp_path / "t.parquet", {"url": ["/a.jpg"], "hash": pa.array([b"12345678"], pa.binary(8))})
    assert [row["uri"] for row in _rows(path, run)] == ["/a.jpg"]


def test_urls_stored_as_bytes_are_urls(tmp_path, run):
    path = _write(tmp_path / "t.parquet", {"url": [b"/a.jpg", b"/\xff.jpg", None], "n": [1, 2, 3]})
    rows = _rows(path, run)
    assert [row["uri"] for row in rows] == ["/a.jpg", r"/\xff.jpg", None]
    assert [row["data"] for row in rows] == [None] * 3


def test_whole_floats_are_ids_as_pandas_had_them(tmp_path, run):
    path = _write(tmp_path / "t.parquet", {"image": [b"a"] * 4, "id": [123_456_789_012.0, 1.5, None, float("nan")]})
    rows = _rows(path, run, InputConfig(id_column="id"))
    assert [row["image_id"] for row in rows] == ["123456789012", "1.5", "t.parquet#2", "t.parquet#3"]


@pytest.mark.parametrize("nested", [False, True], ids=["bytes", "struct"])
def test_a_value_that_a_file_holds_once_is_not_held_for_every_row_at_once(tmp_path, run, nested):
    """743 bytes filled 2.2 GB. Each image is larger than a block may be, so that one row is held at a time."""
    images = pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int32()), pa.array([b"x" * (33 << 20)]))
    column = pa.StructArray.from_arrays([images], ["bytes"]) if nested else images
    path = _write(tmp_path / "t.parquet", {"image": column}, compression="zstd", store_schema=False)
    assert Path(path).stat().st_size < 10_000
    frozen = freeze(path, InputConfig(), run)
    before, sizes = pa.total_allocated_bytes(), []
    for table in read_unit(frozen.units[0], frozen.columns, InputConfig(), run_folder=run):
        sizes += [len(value) for value in table["data"].to_pylist()]
        assert pa.total_allocated_bytes() - before < 8 * (33 << 20)
        if len(sizes) > 5:
            break
    assert set(sizes) == {33 << 20}


@pytest.mark.parametrize("options", [{}, {"data_page_version": "2.0"}, {"use_dictionary": False}], ids=str)
def test_a_page_that_becomes_gigabytes_is_a_reject_before_it_does(tmp_path, run, monkeypatch, options):
    monkeypatch.setattr("captioner.storage.parquet_pages._MAX_BOMB_BYTES", 1 << 20)
    path = _write(tmp_path / "t.parquet", {"image": [b"x" * (2 << 20)] * 2}, compression="zstd", **options)
    rows = _rows(path, run)
    assert [row["reason"] for row in rows] == ["corrupt"] * 2
    assert re.search(r"a page of \d+ bytes that becomes [24],\d+,\d+", rows[0]["detail"])


def _batch_sizes(monkeypatch):
    """Return a list that the sizes of the batches will be in that Arrow is asked for."""
    sizes, plain = [], pq.ParquetFile.iter_batches
    asked = lambda file, **options: sizes.append(options["batch_size"]) or plain(file, **options)  # noqa: E731
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", asked)
    return sizes


def _lying(path, size_bytes):
    """Let the footer say that its row group holds 100 bytes, in as many bytes as it says that now."""

    def varint(number, length):
        return bytes((number >> 7 * place & 0x7F) | (0x80 if place < length - 1 else 0) for place in range(length))

    true = varint(size_bytes << 1, -(-(size_bytes << 1).bit_length() // 7))
    head, marked, tail = path.read_bytes().rpartition(b"\x16" + true)
    assert marked, "Arrow writes its footers in another way now"
    path.write_bytes(head + b"\x16" + varint(200, len(true)) + tail)


def test_a_footer_that_lies_about_sizes_makes_no_large_batch(tmp_path, run, monkeypatch):
    """By the sum in it all rows would be read at once."""
    monkeypatch.setattr("captioner.inputs.parquet._MAX_AT_ONCE", 1 << 20)
    images = [bytes([row]) * 10_000 for row in range(200)] + [bytes([row]) * 100_000 for row in range(200)]
    path = tmp_path / "t.parquet"
    _write(path, {"image": images}, use_dictionary=False, data_page_size=1 << 16, write_batch_size=4)
    _lying(path, pq.ParquetFile(path).metadata.row_group(0).total_byte_size)
    assert pq.ParquetFile(path).metadata.row_group(0).total_byte_size == 100
    sizes = _batch_sizes(monkeypatch)
    assert [row["data"] for row in _rows(path, run)] == images
    assert sizes == [65_536, 52, 5]  # from the first page on, and from the first page of larger images on


@pytest.mark.parametrize("kind", ["list", "large list", "map", "struct of lists"])
def test_a_text_that_a_list_repeats_is_not_held_for_every_row_at_once(tmp_path, run, kind):
    """The file has 2 KB, the column 320 MB."""
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 320, pa.int32()), pa.array(["x" * (1 << 20)]))
    keys, offsets = pa.array(["k"] * 320), pa.array(range(0, 321, 4), pa.int32())
    column = {
        "list": lambda: pa.ListArray.from_arrays(offsets, texts),
        "large list": lambda: pa.LargeListArray.from_arrays(offsets.cast(pa.int64()), texts),
        "map": lambda: pa.MapArray.from_arrays(offsets, keys, texts),
        "struct of lists": lambda: pa.StructArray.from_arrays([pa.ListArray.from_arrays(offsets, texts)], ["a"]),
    }[kind]()
    rows = {"image": [b"x"] * 80, "more": column}
    path = _write(tmp_path / "t.parquet", rows, compression="zstd", store_schema=False)
    assert Path(path).stat().st_size < 20_000
    config = InputConfig(image_column="image", keep_columns=("more",))
    frozen = freeze(path, config, run)
    before, num_rows = pa.total_allocated_bytes(), 0
    for table in read_unit(frozen.units[0], frozen.columns, config, run_folder=run):
        assert pa.total_allocated_bytes() - before < 130 << 20
        num_rows += table.num_rows
        if num_rows > 20:
            break
    more = table["more"][0].as_py()
    texts = more["a"] if kind == "struct of lists" else [value for _, value in more] if kind == "map" else more
    assert [len(text) for text in texts] == [1 << 20] * 4


def test_lists_and_texts_of_all_kinds_are_read_as_any_values(tmp_path, run):
    lists = [["a", None, "b"], None, [], ["a"]] * 50
    columns = {
        "image": pa.array([b"x"] * 200),
        "lists": pa.array(lists, pa.list_(pa.large_string())),
        "maps": pa.array(
            [None if one is None else [(str(n), v) for n, v in enumerate(one)] for one in lists],
            pa.map_(pa.string(), pa.string()),
        ),
        "deep": pa.array(
            [None if one is None else [{"t": one}] for one in lists],
            pa.list_(pa.struct([("t", pa.list_(pa.string()))])),
        ),
        "wide": pa.array(["y", None] * 100, pa.large_string()),
        "view": pa.array(["z", None] * 100, pa.string_view()),
        "number": pa.array([Decimal("1.5"), None] * 100, pa.decimal128(5, 2)),
        "fixed": pa.array([[1.0, 2.0], None] * 100, pa.list_(pa.float32(), 2)),
    }
    path = _write(tmp_path / "t.parquet", columns, store_decimal_as_integer=False)
    names = tuple(name for name in columns if name != "image")
    rows = _rows(path, run, InputConfig(image_column="image", keep_columns=names))
    for name in names:
        assert [row[name] for row in rows] == columns[name].to_pylist(), name


def test_wide_fixed_values_that_a_file_holds_once_are_read_few_at_once(tmp_path, run, monkeypatch):
    wide = pa.DictionaryArray.from_arrays(
        pa.array([0] * 300, pa.int32()), pa.array([b"x" * (1 << 20)], pa.binary(1 << 20))
    )
    path = _write(tmp_path / "t.parquet", {"image": wide}, compression="zstd", store_schema=False)
    sizes = _batch_sizes(monkeypatch)
    frozen = freeze(path, InputConfig(), run)
    table = next(read_unit(frozen.units[0], frozen.columns, InputConfig(), run_folder=run))
    assert (sizes, len(table["data"][0].as_py())) == ([32], 1 << 20)


def test_a_list_of_more_items_than_its_bytes_can_mean_is_a_reject(tmp_path, run, monkeypatch):
    monkeypatch.setattr("captioner.inputs.parquet._MAX_ITEMS", 1 << 16)
    path = _write(tmp_path / "t.parquet", {"image": [b"x"], "n": pa.array([[7] * (1 << 20)])}, compression="zstd")
    [row] = _rows(path, run, InputConfig(image_column="image", keep_columns=("n",)))
    assert row["reason"] == "corrupt"
    assert "lists of 1,048,576 items in a page of" in row["detail"]


def test_dictionaries_and_nulls_are_read_as_any_values(tmp_path, run):
    values = [b"aa", None, b"bb", b"aa"] * 100
    structs = [None if value is None else {"bytes": value, "path": f"{value!r}.jpg"} for value in values]
    path = _write(tmp_path / "t.parquet", {"image": structs, "text": ["x", None] * 200})
    rows = _rows(path, run, InputConfig(keep_columns=("text",)))
    assert [row["data"] for row in rows] == values
    assert [row["text"] for row in rows] == ["x", None] * 200


def test_a_row_group_of_nulls_is_read_in_few_batches(tmp_path, run, monkeypatch):
    """50 million rows of nulls took hours: each batch of 512 looked at all positions that are left."""
    batches = []
    plain = parquet._Reader._batches
    monkeypatch.setattr(
        parquet._Reader, "_batches", lambda *args: (batches.append(batch) or batch for batch in plain(*args))
    )
    path = _write(tmp_path / "t.parquet", {"image": pa.nulls(200_000, pa.binary())})
    frozen = freeze(path, InputConfig(), run)
    done = np.ones(199_990, bool)
    [table] = read_unit(frozen.units[0], frozen.columns, InputConfig(), run_folder=run, done=done)
    assert table["reason"].to_pylist() == ["empty"] * 10
    assert len(batches) == 4


def test_a_table_of_millions_of_light_rows_is_cut_into_few_slices(tmp_path, run):
    """Each slice skips the rows of its row group before it: with 2,048 rows each 50 million would be quadratic."""
    path = _write(tmp_path / "t.parquet", {"image": pa.nulls(4, pa.binary())})
    [unit] = freeze(path, InputConfig(), run).units
    pieces = list(
        cut(replace(unit, num_rows=5_000_000), 5_000_000, lambda start, stop: np.zeros(stop - start, bool), {})
    )
    assert (len(pieces), pieces[-1].stop) == (500, 5_000_000)


def test_structs_of_several_row_groups_are_read_as_one_file(tmp_path):
    """Each row group has a dictionary of its own."""
    values = [{"bytes": bytes([row]) * 10, "path": f"{row}.jpg"} for row in range(9)]
    path = _write(tmp_path / "t.parquet", {"image": values}, row_group_size=2)
    file, _ = parquet.open_parquet(open_store(path), path, as_dictionaries=True)
    assert [row["image"] for batch in parquet.plain_batches(file, 4, ["image"]) for row in batch.to_pylist()] == values
    assert [row["data"] for row in _rows(path, str(tmp_path / "run"))] == [value["bytes"] for value in values]


@pytest.mark.parametrize("name", ["sha256", "image_md5", "pHash", "clip.embedding"])
def test_bytes_that_are_called_a_hash_are_no_image_where_there_is_another_column(tmp_path, run, name):
    _write(tmp_path / "a.parquet", {name: [b"12345678"], "url": ["a.jpg"]})
    assert _rows(tmp_path / "a.parquet", run)[0]["uri"] == f"{tmp_path}/a.jpg"
    _write(tmp_path / "b.parquet", {name: [b"12345678"], "image": [b"x"]})
    assert _rows(tmp_path / "b.parquet", run)[0]["data"] == b"x"


@pytest.mark.parametrize(
    ("first", "later", "config", "message"),
    [
        (
            {"id": [1]},
            {"id": [[1]]},
            {"id_column": "id"},
            r"--id-column id of 1.parquet is list<.*>; expected a string",
        ),
        (
            {"Text": ["x"]},
            {"text": ["y"]},
            {"keep_columns": ("Text",)},
            r"--keep-columns Text: 1.parquet has text, which differs in case alone",
        ),
        (
            {"Text": ["x"]},
            {"text": ["y"]},
            {"prompt_columns": ("Text",)},
            r"--prompts Text: 1.parquet has text, which differs in case alone",
        ),
        (
            {"n": [1]},
            {"n": ["y"]},
            {"prompt_columns": ("n",)},
            r"--prompts n is int64 in 0.parquet and string in 1.parquet; expected one type. Drop it from --prompts",
        ),
    ],
)
def test_a_later_file_whose_columns_do_not_fit_is_named(tmp_path, run, first, later, config, message):
    for number, columns in enumerate((first, later)):
        _write(tmp_path / f"in/{number}.parquet", {"image": [b"x"], **columns})
    with pytest.raises(InputError, match=message):
        freeze(str(tmp_path / "in"), InputConfig(**config), run)
