"""Inputs made up to break their readers, where random damage would not get far: headers whose sums are right again."""

import gzip
import io
import tarfile
import uuid
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data  # noqa: F401 - brings Ray's own column types, as every process of a job has them
from hypothesis import given
from hypothesis import strategies as st

from captioner.config import InputConfig
from captioner.errors import CaptionerError
from captioner.inputs import Columns, Limits, Unit, freeze, read_unit
from captioner.storage import open_store
from tests.hypothesis_profiles import max_examples

COLUMNS = Columns(kept=(pa.field("txt", pa.string()), pa.field("n", pa.string())), kept_from=("txt", "n"))
ODD = [b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"9" * 12, b"\x80" + b"\xff" * 11, b"-1", b'"', b"\n", b"\\ud800"]


SIZES = [b"\x80" + b"\xff" * 11, b"\x80" + b"\0" * 4 + b"\x7f" * 7, b"\xff" * 12, b"77777777777\0", b"-1".ljust(12)]


def tar_of(kind: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for number in range(4):
            for ending, body in (("jpg", b"j" * 700), ("txt", b"a text"), ("json", b'{"n": {"m": [1, 2.5, null]}}')):
                info = tarfile.TarInfo("folder-ü/" * (1 + 20 * (number % 2)) + f"{number}.{ending}")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


def table_of(**how: object) -> bytes:
    buffer = io.BytesIO()
    table = pa.table(
        {
            "image": [bytes([number]) * 200 for number in range(10)],
            "id": range(10),
            "nested": [{"a": [number], "b": "x"} for number in range(10)],
        }
    )
    pq.write_table(table, buffer, row_group_size=4, **how)
    return buffer.getvalue()


TARS = [tar_of(tarfile.PAX_FORMAT), tar_of(tarfile.GNU_FORMAT)]
TABLES = [table_of(), table_of(compression="zstd", data_page_version="2.0"), table_of(use_dictionary=False)]
LISTS = [
    b"a.jpg\nhttp://x/y.jpg\n~/b.jpg\n\xff.jpg\n",
    b'url,text\na.jpg,"x, y"\n,z\n"b\nc.jpg",q\n',
    b"url\ttext\na\tb\n",
]


@st.composite
def damaged(draw: Callable[..., object], files: list[bytes]) -> bytes:
    data = bytearray(draw(st.sampled_from(files)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["byte", "odd", "cut", "insert", "splice", "size"])):
            case "byte":
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "odd":
                odd = draw(st.sampled_from(ODD))
                data[at : at + len(odd)] = odd
            case "cut":
                del data[at : at + draw(st.sampled_from([1, 4, 512, 1 << 20]))]
            case "insert":
                data[at:at] = draw(st.sampled_from(ODD))
            case "size":  # where the header of a tar's member has its own
                data[at // 512 * 512 + 124 : at // 512 * 512 + 136] = draw(st.sampled_from(SIZES))
            case "splice":
                other = draw(st.sampled_from(files))
                data[at : at + 64] = other[at : at + 64]
    return bytes(data)


def with_sums(data: bytes) -> bytes:
    """Return a tar whose headers, whatever they say, have the checksums that they should."""
    fixed = bytearray(data)
    for start in range(0, len(fixed) - 511, 512):
        if fixed[start + 257 : start + 262] == b"ustar":
            total = 256 + sum(fixed[start : start + 148]) + sum(fixed[start + 156 : start + 512])
            fixed[start + 148 : start + 156] = b"%06o\0 " % (total & 0o777777)
    return bytes(fixed)


@max_examples(150)
@given(damaged(TARS), st.sampled_from([bytes, gzip.compress]))
def test_a_tar_with_any_header_never_raises(data: bytes, pack: Callable[[bytes], bytes]) -> None:
    folder = f"memory://{uuid.uuid4().hex}"
    store = open_store(folder)
    store.write_atomic(f"{folder}/s.tar", pack(with_sums(data)))
    unit = Unit(ordinal=0, kind="webdataset", path=f"{folder}/s.tar", name="s.tar", num_rows=None, size_bytes=None)
    limits = Limits(max_image_bytes=1 << 20)
    tables = read_unit(unit, COLUMNS, InputConfig(), run_folder=folder, limits=limits)
    rows = [row for table in tables for row in table.to_pylist()]
    store.remove(f"{folder}/s.tar")
    assert [row["key"] for row in rows] == list(range(len(rows)))
    assert all((row["data"] is None) == (row["reason"] is not None) for row in rows)


@max_examples(150)
@given(damaged(TABLES), st.booleans())
def test_a_damaged_table_is_refused_or_gives_each_row_once(tmp_path: Path, data: bytes, keeps: bool) -> None:
    path = tmp_path / "t.parquet"
    path.write_bytes(data)
    config = InputConfig(image_column="image", keep_columns=("nested", "id=number") if keeps else ())
    try:
        frozen = freeze(str(path), config, str(tmp_path / "run"))
        tables = [*read_unit(frozen.units[0], frozen.columns, config, run_folder=str(tmp_path / "run"))]
    except CaptionerError:
        return
    rows = [row for table in tables for row in table.to_pylist()]
    assert sorted(row["key"] for row in rows) == list(range(frozen.num_images or 0))


@max_examples(150)
@given(damaged(LISTS), st.sampled_from(["txt", "csv", "tsv"]))
def test_a_damaged_list_is_refused_or_gives_each_row_once(tmp_path: Path, data: bytes, ending: str) -> None:
    path = tmp_path / f"list.{ending}"
    path.write_bytes(data)
    try:
        frozen = freeze(str(path), InputConfig(), str(tmp_path / "run"))
    except CaptionerError:
        return
    tables = read_unit(frozen.units[0], frozen.columns, InputConfig(), run_folder=str(tmp_path / "run"))
    keys = [row["key"] for table in tables for row in table.to_pylist()]
    assert keys == list(range(frozen.num_images or 0))
