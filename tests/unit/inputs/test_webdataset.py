import gzip
import io
import re
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from captioner.config import InputConfig
from captioner.errors import ConfigError, InputError
from captioner.inputs import (
    Limits,
    count_images,
    freeze,
    load_frozen,
    num_further_images,
    read_unit,
    save_further,
)
from captioner.schema import split_key
from captioner.storage import SteadyFile
from captioner.storage.faults import Fault, StoreError
from captioner.storage.local_store import LocalStore


@pytest.fixture
def run(tmp_path):
    return str(tmp_path / "out/_run")


def _tar(members, kind=tarfile.GNU_FORMAT):
    """Return a tar of (name, bytes) and of ready TarInfos."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def _samples(num, size=10):
    return [(f"{n:04d}.{end}", bytes([n]) * size) for n in range(num) for end in ("jpg", "txt")]


def _freeze(path, run, config=InputConfig()):  # noqa: B008
    return freeze(str(path), config, run)


def _read(frozen, run, config=InputConfig(), **options):  # noqa: B008
    tables = [t for unit in frozen.units for t in read_unit(unit, frozen.columns, config, run_folder=run, **options)]
    return pa.concat_tables(tables).to_pylist() if tables else []


def _rows(path, run, config=InputConfig(), **options):  # noqa: B008
    return _read(_freeze(path, run, config), run, config, **options)


DOTS = [("v1.0.jpg", b"1"), ("v1.0.txt", b"x"), ("v1.5.jpg", b"2"), ("v1.5.txt", b"y"), ("v2.0.jpg", b"3")]


def test_further_images_of_a_sample_are_counted(tmp_path, run):
    (tmp_path / "a.tar").write_bytes(_tar(DOTS))
    further = []
    rows = _rows(tmp_path / "a.tar", run, on_further=further.append)
    assert [row["image_id"] for row in rows] == ["a.tar/v1.0.jpg", "a.tar/v2.0.jpg"]
    assert further == [1]
    save_further(0, 1, run)
    assert num_further_images(run) == 1
    assert load_frozen(run).skipped == {"further images of samples (--tar-images all takes them)": 1}


def test_all_images_of_a_sample_are_rows_of_their_own_if_asked_for(tmp_path, run):
    (tmp_path / "a.tar").write_bytes(_tar(DOTS))
    further = []
    config = InputConfig(tar_images="all", keep_columns=("text=0.txt",))
    rows = _rows(tmp_path / "a.tar", run, config, on_further=further.append)
    assert [(row["image_id"], row["data"]) for row in rows] == [
        ("a.tar/v1.0.jpg", b"1"),
        ("a.tar/v1.5.jpg", b"2"),
        ("a.tar/v2.0.jpg", b"3"),
    ]
    assert further == [0]
    assert load_frozen(run).columns.has_all_images
    counts = []
    assert count_images(load_frozen(run).units[0], load_frozen(run).columns, config, counts.append) == 3


def test_texts_about_a_tar_are_no_samples_but_in_an_input_that_an_earlier_release_froze(tmp_path, run):
    beside = ["README", "data/LICENSE.txt", "Makefile", "._0.jpg", "__MACOSX/0.jpg", "a/.DS_Store"]
    members = [
        *((name, b"t") for name in beside),
        ("0.jpg", b"0"),
        ("history.jpg", b"1"),
        ("history.txt", b"t"),
        ("f00d", b"2"),
    ]
    (tmp_path / "a.tar").write_bytes(_tar(members))
    frozen = _freeze(tmp_path / "a.tar", run)
    assert [row["image_id"] for row in _read(frozen, run)] == ["a.tar/0.jpg", "a.tar/history.jpg", "a.tar/f00d"]
    assert load_frozen(run).columns.leaves_out_texts
    earlier = replace(frozen, columns=replace(frozen.columns, leaves_out_texts=False))
    assert len(_read(earlier, run)) == 6


def test_tar_images_of_an_input_without_tars_is_refused(tmp_path, run):
    (tmp_path / "a.jpg").write_bytes(b"1")
    with pytest.raises(ConfigError, match=r"--tar-images all: .* has no tars"):
        _freeze(tmp_path, run, InputConfig(tar_images="all"))


def test_two_images_of_the_same_name_are_two_samples(tmp_path, run):
    (tmp_path / "a.tar").write_bytes(_tar([("a.jpg", b"1"), ("a.txt", b"x"), ("a.jpg", b"2")]))
    assert [row["data"] for row in _rows(tmp_path / "a.tar", run)] == [b"1", b"2"]


def test_a_tar_without_a_member_is_refused(tmp_path, run):
    (tmp_path / "a.tar").write_bytes(_tar([]))
    with pytest.raises(InputError, match=r"none of its 1 files can be read; the first is empty: a tar without a membe"):
        _freeze(tmp_path / "a.tar", run)


def test_consecutive_members_that_share_a_key_are_one_sample(tmp_path, run):
    members = [
        ("./a/000.txt", b"first"),
        ("./a/000.JPG", b"0"),
        ("./a/000.seg.png", b"mask"),
        ("a.b/001.png", b"1"),
        ("a.b/001.json", b'{"w": 640, "tag": "x", "none": null}'),
        ("plain", b"2"),
        ("000.jpg", b"3"),
    ]
    (tmp_path / "s.tar").write_bytes(_tar(members))
    config = InputConfig(keep_columns=("txt", "w", "tag=label", "none"))
    rows = _rows(tmp_path / "s.tar", run, config)
    assert [row["image_id"] for row in rows] == ["s.tar/a/000.JPG", "s.tar/a.b/001.png", "s.tar/plain", "s.tar/000.jpg"]
    assert [row["data"] for row in rows] == [b"0", b"1", b"2", b"3"]
    kept = [(row["txt"], row["w"], row["label"], row["none"]) for row in rows]
    assert kept == [("first", None, None, None), (None, "640", "x", None), (None,) * 4, (None,) * 4]


def test_the_image_column_names_the_ending_to_take(tmp_path, run):
    (tmp_path / "s.tar").write_bytes(_tar([("0.jpg", b"a"), ("0.seg.png", b"b"), ("1.jpg", b"c")]))
    rows = _rows(tmp_path / "s.tar", run, InputConfig(image_column="seg.png"))
    assert [row["data"] for row in rows] == [b"b", None]
    assert (rows[1]["reason"], rows[1]["image_id"]) == ("missing", "s.tar/1")


def test_a_sample_without_an_image_is_a_reject_that_says_what_it_has(tmp_path, run):
    (tmp_path / "s.tar").write_bytes(_tar([("0.txt", b"a"), ("0.json", b"{}"), ("1.jpg", b""), ("2.jpg", b"x")]))
    rows = _rows(tmp_path / "s.tar", run)
    assert [(row["reason"], row["detail"]) for row in rows] == [
        ("missing", "no image member among: txt, json"),
        ("empty", "0 bytes"),
        (None, None),
    ]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["0.jpg", "dir/" * 20 + "long-ü-name.jpg", "a b#?%{x}*.jpg"])
def test_tars_of_every_format_are_read(tmp_path, run, kind, name):
    (tmp_path / "s.tar").write_bytes(_tar([(name, b"x" * 600), ("last.jpg", b"y")], kind))
    rows = _rows(tmp_path / "s.tar", run)
    assert [row["image_id"] for row in rows] == [f"s.tar/{name}", "s.tar/last.jpg"]
    assert [row["data"] for row in rows] == [b"x" * 600, b"y"]


@pytest.mark.parametrize("name", ["s.tar.gz", "s.tgz", "s.tar"])
def test_a_compressed_tar_is_known_by_its_bytes(tmp_path, run, name):
    (tmp_path / name).write_bytes(gzip.compress(_tar(_samples(3))))
    assert [row["data"] for row in _rows(tmp_path / name, run)] == [bytes([n]) * 10 for n in range(3)]


def test_names_lead_nowhere_and_links_are_not_followed(tmp_path, run):
    link, device, folder = tarfile.TarInfo("2.jpg"), tarfile.TarInfo("3.jpg"), tarfile.TarInfo("4.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device.type = tarfile.CHRTYPE
    folder.type = tarfile.DIRTYPE
    plain_link = tarfile.TarInfo("latest")
    plain_link.type, plain_link.linkname = tarfile.LNKTYPE, "0.jpg"
    members = [("../../escape/0.jpg", b"a"), ("/abs/1.jpg", b"b"), link, device, folder, plain_link, ("5.jpg", b"c")]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/s.tar").write_bytes(_tar(members))
    before = {path for path in tmp_path.rglob("*") if "out" not in path.parts}
    rows = _rows(tmp_path / "in/s.tar", run)
    assert [row["data"] for row in rows] == [b"a", b"b", None, None, b"c"]
    assert [row["detail"] for row in rows[2:4]] == [
        "a link to /etc/passwd; links are not followed",
        "a device or a pipe",
    ]
    assert rows[2]["reason"] == "unsupported"
    assert {path for path in tmp_path.rglob("*") if "out" not in path.parts} == before
    assert not Path(tmp_path.parent / "escape").exists()


def test_hidden_members_are_left_out(tmp_path, run):
    members = [("._0.jpg", b"x"), ("__MACOSX/0.jpg", b"x"), (".DS_Store", b"x"), ("0.jpg", b"a"), (".git/1.jpg", b"x")]
    (tmp_path / "s.tar").write_bytes(_tar(members))
    assert [row["data"] for row in _rows(tmp_path / "s.tar", run)] == [b"a"]


def test_several_tars_have_keys_and_names_of_their_own(tmp_path, run):
    for shard in (1, 0):
        (tmp_path / "in" / str(shard)).mkdir(parents=True)
        (tmp_path / "in" / str(shard) / "s.tar").write_bytes(_tar(_samples(2)))
        (tmp_path / "in" / str(shard) / "s.parquet").write_bytes(b"statistics")
    frozen = _freeze(tmp_path / "in", run)
    rows = _read(frozen, run)
    assert [split_key(row["key"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert rows[2]["image_id"] == "1/s.tar/0000.jpg"
    assert frozen.num_images is None
    assert frozen.skipped == {".parquet": 2}


def test_braces_name_shards_and_one_that_is_missing_is_a_reject(tmp_path, run):
    (tmp_path / "s-01.tar").write_bytes(_tar(_samples(1)))
    rows = _rows(f"{tmp_path}/s-{{00..02}}.tar", run)
    assert [(row["image_id"], row["reason"]) for row in rows] == [
        ("s-00.tar", "missing"),
        ("s-01.tar/0000.jpg", None),
        ("s-02.tar", "missing"),
    ]


def test_tars_that_are_all_unreadable_are_an_error(tmp_path, run):
    for name in "ab":
        (tmp_path / f"{name}.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(InputError, match=r"none of its 2 files can be read; the first is corrupt: .*no tar header"):
        _freeze(f"{tmp_path}/*.tar", run)


def test_an_id_column_of_tars_is_refused(tmp_path, run):
    (tmp_path / "s.tar").write_bytes(_tar(_samples(1)))
    with pytest.raises(ConfigError, match=r"--id-column: samples of a tar are named by their members"):
        _freeze(tmp_path / "s.tar", run, InputConfig(id_column="id"))


# -- resume, limits


def test_samples_are_counted_without_their_bodies(tmp_path, run):
    (tmp_path / "s.tar").write_bytes(_tar(_samples(40)))
    frozen = _freeze(tmp_path / "s.tar", run)
    assert count_images(frozen.units[0], frozen.columns, InputConfig()) == 40


@pytest.mark.parametrize("compressed", [False, True])
def test_done_samples_are_left_out_and_keep_their_places(tmp_path, run, compressed):
    data = _tar(_samples(20))
    (tmp_path / "s.tar").write_bytes(gzip.compress(data) if compressed else data)
    done = np.zeros(15, dtype=bool)
    done[[0, 3, 14]] = True
    rows = _rows(tmp_path / "s.tar", run, InputConfig(keep_columns=("txt",)), done=done)
    assert [row["key"] for row in rows] == [n for n in range(20) if n not in (0, 3, 14)]
    assert all(row["data"] == row["txt"].encode() for row in rows)


def test_reading_stops_where_it_is_told(tmp_path, run):
    (tmp_path / "s.tar").write_bytes(_tar(_samples(20)))
    assert [row["key"] for row in _rows(tmp_path / "s.tar", run, limits=Limits(stop_at=3))] == [0, 1, 2]


def test_an_image_larger_than_allowed_is_skipped_over(tmp_path, run):
    (tmp_path / "s.tar").write_bytes(_tar([("0.jpg", b"x" * 3000), ("1.jpg", b"y")]))
    rows = _rows(tmp_path / "s.tar", run, limits=Limits(max_image_bytes=100))
    assert [(row["reason"], row["data"]) for row in rows] == [("too_large", None), (None, b"y")]


def _counted(frozen, num_rows):
    return replace(frozen, units=tuple(replace(unit, num_rows=num_rows) for unit in frozen.units))


def _reasons(rows):
    return [(row["key"], row["reason"]) for row in rows]


def test_a_tar_that_changed_since_it_was_frozen_costs_the_rows_that_are_left_of_it(tmp_path, run):
    (tmp_path / "s.tar").write_bytes(_tar(_samples(3)))
    frozen = _freeze(tmp_path / "s.tar", run)
    (tmp_path / "s.tar").write_bytes(_tar(_samples(20)))
    counts = []
    rows = _read(frozen, run, on_end=counts.append, done=np.array([True, False, True]))
    assert _reasons(rows) == [(1, "changed")]
    assert re.match(r"changed since the job began: it has \d+ bytes, not 10240; restore it", rows[0]["detail"])
    rows = _read(_counted(frozen, 3), run, limits=Limits(stop_at=3), done=np.array([True]))
    assert _reasons(rows) == [(1, "changed"), (2, "changed")]
    assert [row["image_id"] for row in rows] == ["s.tar#1", "s.tar#2"]
    assert counts == []


def test_a_tar_of_the_same_size_with_fewer_samples_changed_too(tmp_path, run):
    (tmp_path / "s.tar").write_bytes(_tar(_samples(4)))
    frozen = _counted(_freeze(tmp_path / "s.tar", run), 4)
    (tmp_path / "s.tar").write_bytes(_tar(_samples(2)))
    rows = _read(frozen, run, limits=Limits(stop_at=4))
    assert _reasons(rows) == [(0, None), (1, None), (2, "changed"), (3, "changed")]
    assert rows[3]["detail"].startswith("changed since the job began: it has 2 samples, not 4")


def test_a_tar_that_is_gone_may_come_back(tmp_path, run):
    (tmp_path / "s.tar").write_bytes(_tar(_samples(3)))
    frozen, counts = _freeze(tmp_path / "s.tar", run), []
    (tmp_path / "s.tar").unlink()
    assert _reasons(_read(frozen, run, on_end=counts.append)) == [(0, "fetch_failed")]
    assert counts == []
    rows = _read(_counted(frozen, 3), run, limits=Limits(stop_at=3), done=np.array([False, True]))
    assert _reasons(rows) == [(0, "fetch_failed"), (2, "fetch_failed")]


def test_the_count_of_a_tar_is_told_before_its_last_row_is_given_out(tmp_path, run):
    (tmp_path / "s.tar").write_bytes(_tar(_samples(5)))
    frozen, counts = _freeze(tmp_path / "s.tar", run), []
    unit = frozen.units[0]
    tables = read_unit(
        unit, frozen.columns, InputConfig(), run_folder=run, limits=Limits(rows_per_block=1), on_end=counts.append
    )
    known = [(table["key"].to_pylist(), list(counts)) for table in tables]
    assert known[0] == ([0], [])
    assert known[-1] == ([4], [5])


def test_a_tar_without_samples_is_one_row(tmp_path, run):
    (tmp_path / "0.tar").write_bytes(_tar(_samples(1)))
    (tmp_path / "1.tar").write_bytes(_tar([(".hidden.jpg", b"x")]))
    frozen, counts = _freeze(f"{tmp_path}/*.tar", run), []
    rows = _read(frozen, run, on_end=counts.append)
    assert [(row["image_id"], row["reason"]) for row in rows] == [("0.tar/0000.jpg", None), ("1.tar#0", "empty")]
    assert counts == [1, 1]


# -- what is broken


def _cut(tmp_path, run, data, **options):
    """Rows of a tar that was whole when it was frozen and whose size the store does not tell."""
    (tmp_path / "s.tar").write_bytes(data)
    return _rows(f"{tmp_path}/s.tar", run, **options)


@pytest.mark.parametrize(
    ("cut_at", "num_good", "detail"),
    [
        (1536 * 2 + 100, 3, "cut short at byte 3,072"),  # in a header
        (1536 * 2, 2, "cut short at byte 3,072, before the block that ends a tar"),
        (1536 + 700, 1, "cut short in 0001.jpg"),  # in a body
        (1536 + 512 + 600, 1, "cut short in 0001.jpg"),
        (1536 * 3, 3, "before the block"),
    ],
)
def test_a_cut_tar_gives_the_rows_before_the_cut_and_one_reject(tmp_path, run, cut_at, num_good, detail):
    data = _tar([(f"{n:04d}.jpg", bytes([n]) * 1000) for n in range(3)])
    num_good = min(num_good, cut_at // 1536)
    rows = _cut(tmp_path, run, data[:cut_at])
    assert [row["data"] for row in rows[:-1]] == [bytes([n]) * 1000 for n in range(num_good)]
    assert rows[-1]["reason"] == "corrupt"
    assert detail in rows[-1]["detail"]
    assert [row["key"] for row in rows] == list(range(num_good + 1))


def test_a_cut_inside_a_sample_costs_that_sample_and_its_image_only_if_it_was_not_whole(tmp_path, run):
    data = _tar([("0.jpg", b"x"), ("0.txt", b"y" * 400), ("1.txt", b"z"), ("1.jpg", b"w" * 600)])
    (tmp_path / "s.tar").write_bytes(data[: 1024 + 512 + 100])
    rows = _rows(tmp_path / "s.tar", run, InputConfig(keep_columns=("txt",)))
    assert [(row["data"], row["txt"], row["reason"]) for row in rows] == [(b"x", None, None), (None, None, "corrupt")]
    rows = _cut(tmp_path, run, data[: 3 * 1024 + 512 + 100])
    assert [(row["image_id"], row["reason"]) for row in rows] == [("s.tar/0.jpg", None), ("s.tar/1", "corrupt")]


@pytest.mark.parametrize("cut_at", [512 * 21, 512 * 19 + 100, 512 * 22 + 100])  # before, in and after an image
def test_the_rows_of_a_cut_tar_have_the_same_places_when_it_is_read_again(tmp_path, run, cut_at):
    data = _tar(_samples(5, size=600))[:cut_at]
    whole = _cut(tmp_path, run, data)
    for num_done in range(len(whole) + 1):
        done = np.arange(len(whole)) < num_done
        rest = _cut(tmp_path, run, data, done=done)
        assert [(row["key"], row["reason"]) for row in rest] == [(r["key"], r["reason"]) for r in whole[num_done:]]


def test_a_damaged_header_in_the_middle_is_not_taken_for_the_end(tmp_path, run):
    data = bytearray(_tar(_samples(5)))
    data[512 * 8 + 20] ^= 0xFF
    rows = _cut(tmp_path, run, bytes(data))
    assert [row["reason"] for row in rows] == [None, None, "corrupt"]
    assert "no tar header at byte 4,096" in rows[-1]["detail"]


def test_a_cut_gzip_gives_what_can_be_unpacked(tmp_path, run):
    noise = np.random.default_rng(0)
    data = gzip.compress(_tar([(f"{n}.jpg", noise.bytes(5000)) for n in range(10)]))
    rows = _cut(tmp_path, run, data[: len(data) // 2])
    assert [row["reason"] for row in rows] == [None] * (len(rows) - 1) + ["corrupt"]
    assert 3 <= len(rows) <= 6


def test_an_empty_file_among_shards_is_one_reject(tmp_path, run):
    (tmp_path / "0.tar").write_bytes(b"")
    (tmp_path / "1.tar").write_bytes(_tar(_samples(1)))
    rows = _rows(f"{tmp_path}/*.tar", run)
    assert [(row["image_id"], row["reason"]) for row in rows] == [("0.tar#0", "corrupt"), ("1.tar/0000.jpg", None)]


def test_a_store_that_stops_delivering_leaves_the_rest_for_another_run(tmp_path, run, monkeypatch):
    monkeypatch.setattr(LocalStore, "buffer_bytes", 512)
    (tmp_path / "s.tar").write_bytes(_tar(_samples(5)))
    frozen = _freeze(tmp_path / "s.tar", run)
    plain = SteadyFile._read_once

    def fail(self, wanted):
        if self._position >= 512 * 9:  # in the image of the third sample
            raise StoreError(Fault("fetch_failed", "HTTP 503"))
        return plain(self, wanted)

    with monkeypatch.context() as patch:
        patch.setattr(SteadyFile, "_read_once", fail)
        rows = _read(frozen, run)
    assert [(row["key"], row["reason"]) for row in rows] == [(0, None), (1, None), (2, "fetch_failed")]
    rest = _read(frozen, run, done=np.array([True, True]))
    assert [(row["key"], row["reason"]) for row in rest] == [(2, None), (3, None), (4, None)]
