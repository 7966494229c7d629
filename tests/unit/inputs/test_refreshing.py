"""An input that grows: what is new gets new keys, what is frozen keeps its own."""

import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.config import InputConfig
from captioner.errors import InputError
from captioner.inputs import Frozen, Refreshed, freeze, load_frozen, read_unit, refresh
from captioner.storage import LocalStore, Location, Place
from tests.conftest import Bucket


def keyed(frozen: Frozen, run_folder: Place, **access: Any) -> dict[int, str]:
    """image_id of each key of the input."""
    config = InputConfig(**access)
    tables = [
        table for unit in frozen.units for table in read_unit(unit, frozen.columns, config, run_folder=run_folder)
    ]
    return {row["key"]: row["image_id"] for table in tables for row in table.select(["key", "image_id"]).to_pylist()}


def grown(input_path: str, run_folder: Path, **access: Any) -> tuple[dict[int, str], dict[int, str], Refreshed]:
    """Keys as they were frozen, keys after a refresh, and what it says."""
    config = InputConfig(**access)
    earlier = load_frozen(str(run_folder))
    assert earlier is not None
    before = keyed(earlier, str(run_folder), **access)
    _, refreshed = refresh(input_path, config, earlier, str(run_folder))
    later = load_frozen(str(run_folder))
    assert later is not None
    return before, keyed(later, str(run_folder), **access), refreshed


def test_new_images_of_a_folder_come_behind_the_frozen_ones(tmp_path: Path) -> None:
    images, run = tmp_path / "images", tmp_path / "run"
    images.mkdir()
    for name in "bdf":
        (images / f"{name}.jpg").write_bytes(b"x")
    freeze(str(images), InputConfig(), str(run))
    for name in "ace":
        (images / f"{name}.jpg").write_bytes(b"x")
    (images / "d.jpg").write_bytes(b"longer")
    (images / "f.jpg").unlink()
    before, after, refreshed = grown(str(images), run)
    assert {key: after[key] for key in before} == before
    assert [Path(after[key]).stem for key in sorted(set(after) - set(before))] == ["a", "c", "e"]
    assert (refreshed.num_new, refreshed.num_changed, refreshed.num_vanished) == (3, 1, 1)
    assert "3 new images; 1 changed and 1 vanished" in str(refreshed)
    assert str(images / "d.jpg") in str(refreshed)
    again = grown(str(images), run)
    assert (again[1], again[2].num_new) == (after, 0)


@pytest.mark.parametrize("ending", ["txt", "csv"])
def test_rows_that_a_list_gained_anywhere_are_new_even_where_they_repeat(tmp_path: Path, ending: str) -> None:
    listing, run = tmp_path / f"list.{ending}", tmp_path / "run"
    header = ["uri"] if ending == "csv" else []
    listing.write_text("\n".join([*header, "a.jpg", "b.jpg", "a.jpg", ""]))
    freeze(str(listing), InputConfig(), str(run))
    listing.write_text("\n".join([*header, "new.jpg", "a.jpg", "b.jpg", "a.jpg", "a.jpg", ""]))
    before, after, refreshed = grown(str(listing), run)
    assert {key: after[key] for key in before} == before
    assert [Path(after[key]).stem for key in sorted(set(after) - set(before))] == ["new", "a"]
    assert (refreshed.num_new, refreshed.num_vanished) == (2, 0)


@pytest.mark.parametrize(
    ("before", "after", "num_new"),
    [
        ("X-Amz-Signature=one", "X-Amz-Signature=two", 0),
        ("AWSAccessKeyId=k&Signature=one&Expires=1", "AWSAccessKeyId=k&Signature=two&Expires=2", 0),
        ("sv=2024&se=1&sr=b&sig=one", "sv=2025&se=2&sr=b&sig=two", 0),
        ("page=1&X-Amz-Signature=one", "page=2&X-Amz-Signature=one", 1),
        ("sv=1", "sv=2", 1),
    ],
)
def test_a_list_that_was_signed_anew_has_no_new_images(tmp_path: Path, before: str, after: str, num_new: int) -> None:
    listing, run = tmp_path / "list.txt", tmp_path / "run"
    listing.write_text(f"https://host/a.jpg?{before}")
    freeze(str(listing), InputConfig(), str(run))
    listing.write_text(f"https://host/a.jpg?{after}")
    _, _, refreshed = grown(str(listing), run)
    assert (refreshed.num_new, refreshed.num_vanished) == (num_new, num_new)


def test_new_parquet_files_are_new_units_and_changed_ones_are_told(tmp_path: Path) -> None:
    tables, run = tmp_path / "tables", tmp_path / "run"
    tables.mkdir()
    for name in ("b", "d"):
        pq.write_table(pa.table({"image": [b"x"], "n": [1]}), tables / f"{name}.parquet")
    freeze(str(tables), InputConfig(keep_columns=("n",)), str(run))
    pq.write_table(pa.table({"image": [b"y", b"z"], "n": [1, 2]}), tables / "a.parquet")
    (tables / "c.parquet").write_bytes(b"none")
    before, after, refreshed = grown(str(tables), run, keep_columns=("n",))
    assert after == {**before, 2 << 32: "a.parquet#0", (2 << 32) + 1: "a.parquet#1", 3 << 32: "c.parquet"}
    assert (refreshed.num_new, refreshed.num_changed) == (2, 0)


def test_a_new_parquet_file_whose_kept_column_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    tables, run = tmp_path / "tables", tmp_path / "run"
    tables.mkdir()
    pq.write_table(pa.table({"image": [b"x"], "n": pa.array([1], pa.int32())}), tables / "a.parquet")
    freeze(str(tables), InputConfig(keep_columns=("n",)), str(run))
    pq.write_table(pa.table({"image": [b"x"], "n": [1.5]}), tables / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet has kept columns of types"):
        grown(str(tables), run, keep_columns=("n",))


def test_new_tars_are_new_units_and_vanished_ones_are_told(tmp_path: Path) -> None:
    tars, run = tmp_path / "tars", tmp_path / "run"
    tars.mkdir()

    def write(name: str) -> None:
        with tarfile.open(tars / name, "w") as tar:
            info = tarfile.TarInfo("0.jpg")
            info.size = 1
            tar.addfile(info, BytesIO(b"x"))

    write("b.tar")
    write("z.tar")
    freeze(str(tars), InputConfig(), str(run))
    (tars / "z.tar").unlink()
    write("a.tar")
    frozen = load_frozen(str(run))
    assert frozen is not None
    later, refreshed = refresh(str(tars), InputConfig(), frozen, str(run))
    assert [unit.name for unit in later.units] == ["b.tar", "z.tar", "a.tar"]
    assert str(refreshed) == "1 new files; 0 changed and 1 vanished since the input was frozen; their rows stay: z.tar"


def test_a_refresh_on_s3_lists_the_bucket_again(s3: Bucket) -> None:
    run = Location(f"{s3.url}/out/_run", s3.storage_options)
    config = InputConfig(storage_options=s3.storage_options)
    s3.put("photos/b.jpg", b"x")
    earlier = freeze(f"{s3.url}/photos", config, run)
    s3.put("photos/a.jpg", b"x")
    refresh(f"{s3.url}/photos", config, earlier, run)
    later = load_frozen(run)
    assert later is not None
    assert keyed(later, run, storage_options=s3.storage_options) == {
        0: f"{s3.url}/photos/b.jpg",
        1 << 32: f"{s3.url}/photos/a.jpg",
    }


@pytest.mark.parametrize("at", [0, 1])
def test_an_interrupted_refresh_leaves_the_frozen_input_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    images, run = tmp_path / "images", tmp_path / "run"
    images.mkdir()
    (images / "b.jpg").write_bytes(b"x")
    freeze(str(images), InputConfig(), str(run))
    (images / "a.jpg").write_bytes(b"x")
    before = load_frozen(str(run))
    assert before is not None
    writes: list[str] = []
    write = LocalStore.write_atomic

    def interrupted(store: LocalStore, url: str, *arguments: Any) -> None:
        if len(writes) == at:
            raise KeyboardInterrupt
        writes.append(url)
        write(store, url, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(LocalStore, "write_atomic", interrupted)
        with pytest.raises(KeyboardInterrupt):
            refresh(str(images), InputConfig(), before, str(run))
    assert load_frozen(str(run)) == before
    assert len(keyed(before, str(run))) == 1
    _, after, refreshed = grown(str(images), run)
    assert (len(after), refreshed.num_new) == (2, 1)


def test_a_dry_refresh_writes_nothing(tmp_path: Path) -> None:
    images, run = tmp_path / "images", tmp_path / "run"
    images.mkdir()
    (images / "b.jpg").write_bytes(b"x")
    frozen = freeze(str(images), InputConfig(), str(run))
    (images / "a.jpg").write_bytes(b"x")
    later, refreshed = refresh(str(images), InputConfig(), frozen, str(run), scratch=str(tmp_path / "scratch"))
    assert (later.num_images, refreshed.num_new) == (2, 1)
    assert load_frozen(str(run)) == frozen
    assert len(list((run / "listing").iterdir())) == 1
