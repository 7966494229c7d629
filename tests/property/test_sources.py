import gzip
import io
import tarfile
import uuid
from dataclasses import replace
from itertools import islice, product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from captioner.config import InputConfig
from captioner.inputs import Columns, Limits, Unit, read_unit
from captioner.schema import TRANSIENT_REASONS, RejectReason, source_schema
from captioner.storage import Store, open_store, urls
from captioner.storage.faults import Fault, StoreError, diagnose
from captioner.storage.patterns import expand_braces
from tests.hypothesis_profiles import max_examples

_plain = st.text(st.characters(exclude_characters="{},", exclude_categories=["Cs"]), max_size=4)
_group = st.one_of(
    st.lists(_plain, min_size=2, max_size=4).map(lambda words: ("{" + ",".join(words) + "}", words)),
    st.tuples(st.integers(0, 30), st.integers(0, 30)).map(
        lambda ends: (
            f"{{{min(ends):03d}..{max(ends):03d}}}",
            [f"{number:03d}" for number in range(min(ends), max(ends) + 1)],
        )
    ),
)


@max_examples(150)
@given(st.lists(st.tuples(_plain, _group), max_size=3), _plain)
def test_braces_expand_to_the_product_of_their_groups(parts, tail):
    pattern = "".join(text + group for text, (group, _) in parts) + tail
    choices = [[text + choice for choice in expanded] for text, (_, expanded) in parts]
    assert expand_braces(pattern) == ["".join(chosen) + tail for chosen in product(*choices)]


@max_examples(150)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30))
def test_any_name_survives_the_way_into_a_url_and_back(name):
    path = "/data/" + name.replace("/", "_")
    assert urls.local_path(urls.local_url(path)) == path or name in (".", "..")
    assert urls.name(urls.resolve(name.replace("/", "_"), "s3://bucket/lists")) or name in (".", "..")


@max_examples(150)
@given(st.text(max_size=60))
def test_nothing_that_follows_a_password_is_ever_shown(text):
    assert "s3cr3t" not in urls.redact(f"https://user:s3cr3t@host/{text}")
    assert "s3cr3t" not in urls.redact(f"https://host/x?{text.replace('#', '')}&X-Amz-Signature=s3cr3t")


def _member(name, size=0, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, "0.jpg"
    return info


def _odd_tar():
    """Return a tar with what other tools leave in one: links, devices, sparse members, samples without an image."""
    members = [_member("a.jpg", 700), _member("b.jpg", kind=tarfile.SYMTYPE), _member("c.jpg", kind=tarfile.LNKTYPE)]
    members += [_member("d.jpg", 700, tarfile.GNUTYPE_SPARSE), _member("d.txt", 20), _member("e.txt", 20)]
    members += [_member("f.jpg", kind=tarfile.CHRTYPE), _member("folder", kind=tarfile.DIRTYPE), _member("g.jpg", 700)]
    blocks = [member.tobuf() + b"x" * (member.size + -member.size % 512) for member in members]
    return b"".join(blocks) + bytes(1024)


def _tar(num=6):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(num):
            for ending, size in (("jpg", 700), ("txt", 20)):
                info = tarfile.TarInfo(f"dir-ü-{number}/" * (1 + 12 * (number % 2)) + f"{number}.{ending}")
                info.size = size
                tar.addfile(info, io.BytesIO(bytes([number]) * size))
    return buffer.getvalue()


_TARS = {"tar": _tar(), "tar.gz": gzip.compress(_tar()), "odd": _odd_tar()}
_CONFIG = InputConfig()
_COLUMNS = Columns(kept=(pa.field("txt", pa.string()),), kept_from=("txt",))


_damage = st.one_of(
    st.tuples(st.just("cut"), st.floats(0, 1), st.just(0)),
    st.tuples(st.just("flip"), st.floats(0, 0.999), st.integers(1, 255)),
    st.tuples(st.just("drop"), st.floats(0, 0.999), st.integers(1, 600)),
    st.tuples(st.just("junk"), st.floats(0, 0.999), st.integers(1, 600)),
)


def _damaged(data, damages):
    data = bytearray(data)
    for kind, share, number in damages:
        place = int(share * len(data))
        if kind == "cut":
            del data[place:]
        elif kind == "flip" and data:
            data[min(place, len(data) - 1)] ^= number
        elif kind == "drop":
            del data[place : place + number]
        elif kind == "junk":
            data[place:place] = np.random.default_rng(number).bytes(number)
    return bytes(data)


class _Flaky:
    """In place of `Store.retried`: the access of this number finds the store gone, after every retry."""

    def __init__(self, fails_at):
        self._left = fails_at

    def __call__(self, access):
        self._left -= 1
        if self._left < 0:
            raise StoreError(Fault(RejectReason.FETCH_FAILED, "HTTP 503"))
        return access()


class _Captioning:
    """Runs over one tar, as a job makes them: what a run took is left out by the next; to be killed loses the rest."""

    def __init__(self, data):
        folder = f"memory://{uuid.uuid4().hex}"
        self._store = open_store(folder)
        self._store.write_atomic(f"{folder}/s.tar", data)
        self._unit = Unit(
            ordinal=0, kind="webdataset", path=f"{folder}/s.tar", name="s.tar", num_rows=None, size_bytes=len(data)
        )
        self.rows = {}
        self.failed = set()

    def run(self, fails_at=1 << 30, killed_after=1 << 30):
        done = np.zeros(max(self.rows, default=-1) + 1, bool)
        done[list(self.rows)] = True
        limits = Limits(rows_per_block=1, stop_at=self._unit.num_rows)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Store, "buffer_bytes", 512)
            patch.setattr(Store, "retried", staticmethod(_Flaky(fails_at)))
            tables = read_unit(
                self._unit, _COLUMNS, _CONFIG, run_folder="", limits=limits, done=done, on_end=self._count
            )
            self._take([row for table in islice(tables, killed_after) for row in table.to_pylist()])

    def _take(self, rows):
        assert not {row["key"] for row in rows} & set(self.rows)
        self.failed |= {row["key"] for row in rows if row["reason"] in TRANSIENT_REASONS}
        self.rows |= {row["key"]: row for row in rows if row["reason"] not in TRANSIENT_REASONS}

    def _count(self, num_rows):
        self._unit = replace(self._unit, num_rows=num_rows)

    @property
    def num_rows(self):
        return self._unit.num_rows


_runs = st.lists(st.tuples(st.integers(0, 60), st.one_of(st.just(1 << 30), st.integers(0, 8))), max_size=4)


@max_examples(150)
@given(st.sampled_from(sorted(_TARS)), st.lists(_damage, max_size=1), _runs)
def test_interrupted_runs_and_a_last_one_give_the_rows_of_an_uninterrupted_run(kind, damages, runs):
    data = _damaged(_TARS[kind], damages)
    unbroken, broken = _Captioning(data), _Captioning(data)
    unbroken.run()
    for fails_at, killed_after in runs:
        broken.run(fails_at, killed_after)
        is_left = set(range(unbroken.num_rows)) > set(broken.rows)
        assert not (is_left and killed_after == 1 << 30) or broken.failed  # a fault is a row that says so
        assert broken.num_rows in (None, unbroken.num_rows)
    broken.run()
    assert broken.rows == unbroken.rows
    assert broken.failed <= set(unbroken.rows)
    assert broken.num_rows == unbroken.num_rows == len(unbroken.rows)


def _read(data, done=None):
    folder = f"memory://{uuid.uuid4().hex}"
    store = open_store(folder)
    store.write_atomic(f"{folder}/s.tar", data)
    unit = Unit(ordinal=0, kind="webdataset", path=f"{folder}/s.tar", name="s.tar", num_rows=None, size_bytes=None)
    tables = read_unit(unit, _COLUMNS, _CONFIG, run_folder=folder, limits=Limits(max_image_bytes=1 << 20), done=done)
    rows = [row for table in tables for row in table.to_pylist()]
    store.remove(f"{folder}/s.tar")
    return rows


@max_examples(150)
@given(st.sampled_from(sorted(_TARS)), st.lists(_damage, min_size=1, max_size=3))
def test_a_damaged_tar_never_raises_and_its_rows_keep_their_places(kind, damages):
    rows = _read(_damaged(_TARS[kind], damages))
    assert [row["key"] for row in rows] == list(range(len(rows)))
    assert all((row["data"] is None) == (row["reason"] is not None) for row in rows)
    broken = [row["reason"] for row in rows if row["reason"] == RejectReason.CORRUPT]
    assert len(broken) <= 1
    if broken:
        assert rows[-1]["reason"] == RejectReason.CORRUPT


@max_examples(150)
@given(st.sampled_from(sorted(_TARS)), st.lists(_damage, max_size=2), st.lists(st.booleans(), max_size=9))
def test_reading_the_rest_of_a_tar_gives_the_rows_that_reading_it_whole_gives(kind, damages, flags):
    data = _damaged(_TARS[kind], damages)
    whole = _read(data)
    rest = _read(data, np.array(flags, dtype=bool))
    assert rest == [row for row in whole if row["key"] >= len(flags) or not flags[row["key"]]]


@max_examples(150)
@given(st.binary(max_size=2000))
def test_any_bytes_are_a_tar_or_one_reject(data):
    rows = _read(data)
    assert all(row["reason"] for row in rows[-1:])


@max_examples(150)
@given(st.sampled_from([OSError, ValueError, TimeoutError, RuntimeError, KeyError]), st.text(max_size=400))
def test_any_exception_has_a_reason_and_a_detail_that_a_table_can_hold(kind, text):
    fault = diagnose(kind(text))
    assert fault.reason in RejectReason
    assert 0 < len(fault.detail) <= 300
    assert pa.array([fault.detail]).type == pa.string()


def test_a_fault_is_described_without_credentials_and_in_utf8():
    fault = diagnose(OSError(f"https://user:s3cr3t@host/{chr(0xDCFF)}?sig=s3cr3t"))
    assert fault.detail == r"OSError: https://***@host/\xff?sig=***"


@pytest.mark.parametrize("rows_per_block", [1, 3, 100])
def test_blocks_of_any_length_hold_the_same_rows(tmp_path, rows_per_block):
    path = Path(tmp_path, "s.tar")
    path.write_bytes(_tar(10))
    unit = Unit(ordinal=3, kind="webdataset", path=str(path), name="s.tar", num_rows=None, size_bytes=None)
    limits = Limits(rows_per_block=rows_per_block)
    tables = list(read_unit(unit, _COLUMNS, _CONFIG, run_folder=str(tmp_path), limits=limits))
    assert [table.num_rows for table in tables][:-1] == [rows_per_block] * (len(tables) - 1)
    assert pa.concat_tables(tables).schema == source_schema(_COLUMNS.kept)
    assert pa.concat_tables(tables)["key"].to_pylist() == [(3 << 32) + n for n in range(10)]


def _parquet():
    buffer = io.BytesIO()
    images = [bytes([number]) * 300 for number in range(12)]
    table = {"image": images, "id": range(12), "txt": [str(number) for number in range(12)]}
    pq.write_table(pa.table(table), buffer, row_group_size=4)
    return buffer.getvalue()


_PARQUET = _parquet()


@max_examples(150)
@given(st.lists(st.tuples(st.integers(0, len(_PARQUET) - 1), st.integers(1, 255)), min_size=1, max_size=4))
@example([(113, 85)])  # the number of a page's values is of another type
def test_a_damaged_table_gives_every_row_once(flips):
    data = bytearray(_PARQUET)
    for place, number in flips:
        data[place] ^= number
    folder = f"memory://{uuid.uuid4().hex}"
    open_store(folder).write_atomic(f"{folder}/t.parquet", bytes(data))
    size_bytes = len(_PARQUET)
    unit = Unit(ordinal=0, kind="parquet", path=f"{folder}/t.parquet", name="t", num_rows=12, size_bytes=size_bytes)
    columns = Columns(image="image", id="id", kept=_COLUMNS.kept, kept_from=("txt",))
    tables = list(read_unit(unit, columns, _CONFIG, run_folder=folder))
    rows = pa.concat_tables(tables).to_pylist()
    assert sorted(row["key"] for row in rows) == list(range(12))
    assert all(((row["data"] is None) and row["uri"] is None) == (row["reason"] is not None) for row in rows)
