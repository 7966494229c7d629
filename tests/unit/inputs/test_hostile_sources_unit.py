"""What an input made by an enemy must not do: end the job, read what is not its own, or learn our credentials."""

import gzip
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import tracemalloc
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data  # noqa: F401 - brings Ray's own column types, some of which hold pickles

from captioner.captioning.job import resolve
from captioner.config import CaptionJobConfig, ImageConfig, InputConfig
from captioner.errors import ConfigError, InputError
from captioner.inputs import Columns, Fetcher, Limits, Unit, freeze, read_unit
from captioner.inputs.selection import select
from captioner.schema import Reject, RejectReason
from captioner.storage import StoreError, hosts, open_store, urls

JPEG = b"j" * 100
END = b"\0" * 1024


def header(name: str, size: int, kind: bytes = b"0") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def member(name: str, body: bytes, size: int | None = None, kind: bytes = b"0") -> bytes:
    return header(name, len(body) if size is None else size, kind) + body + b"\0" * (-len(body) % 512)


def pax(*records: bytes) -> bytes:
    return member("pax", b"".join(records), kind=b"x")


def record(key: bytes, value: bytes) -> bytes:
    size = len(key) + len(value) + 3
    return b"%d %s=%s\n" % (size + len(str(size + len(str(size)))), key, value)


def read_tar(data: bytes, limits: Limits = Limits()) -> list[pa.Table]:  # noqa: B008
    folder = f"memory://{uuid.uuid4().hex}"
    open_store(folder).write_atomic(f"{folder}/s.tar", data)
    unit = Unit(ordinal=0, kind="webdataset", path=f"{folder}/s.tar", name="s.tar", num_rows=None, size_bytes=None)
    columns = Columns(kept=(pa.field("text", pa.string()),), kept_from=("text",))
    return list(read_unit(unit, columns, InputConfig(), run_folder=folder, limits=limits))


def rows_of(tables: list[pa.Table]) -> list[dict[str, Any]]:
    return [row for table in tables for row in table.to_pylist()]


# -- tars


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize(
    "damage",
    [
        pax(b"38 size=" + b"9" * 29 + b"\n"),
        pax(b"5011 size=" + b"9" * 5000 + b"\n"),
        pax(b"9" * 5000 + b" size=1\n"),
        header("a.jpg", 1 << 80),
        header("a.txt", (1 << 63) - 1),
        header("a.jpg", (1 << 60) + 1),
    ],
    ids=["30 digits", "5,000 digits", "a length of 5,000 digits", "2^80", "2^63", "2^60"],
)
def test_a_size_that_no_number_can_hold_is_one_reject(damage: bytes, compress: Callable[[bytes], bytes]) -> None:
    rows = rows_of(read_tar(compress(member("0.jpg", JPEG) + damage + member("1.jpg", JPEG) + END)))
    assert [(row["image_id"], row["reason"]) for row in rows] == [("s.tar/0.jpg", None), ("s.tar#1", "corrupt")]
    assert len(rows[1]["detail"]) < 300


@pytest.mark.parametrize(
    ("parts", "detail"),
    [
        (lambda: [member("p", b"a." + b"x" * 1_000_000, kind=b"L"), member("a", b"")], "a name of 1,000,002 bytes"),
        (lambda: [pax(record(b"path", b"x" * 20_000)), member("a", b"")], "a name of 20,000 bytes"),
        (
            lambda: [member("p", b"0.%d" % n + b"x" * 16_000, kind=b"L") + member("a", b"") for n in range(70)],
            "the names of the members that share the key 0 are too long",
        ),
    ],
    ids=["long name", "pax path", "endings"],
)
def test_names_that_no_file_can_have_are_one_reject(parts: Callable[[], list[bytes]], detail: str) -> None:
    rows = rows_of(read_tar(member("0.jpg", JPEG) + b"".join(parts()) + END))
    assert [row["reason"] for row in rows] == [None, "corrupt"]
    assert detail in rows[1]["detail"]


def test_a_pax_header_is_read_in_one_pass_and_what_it_says_of_sparse_files_is_not_held() -> None:
    """As a bomb, 400 KB of such headers took 6.7 s of a CPU each, and 483 MB."""
    records = [record(b"GNU.sparse.%d" % number, b"x") for number in range(10_000)]
    headers = pax(*records)
    tracemalloc.start()
    rows = rows_of(read_tar(headers * 4 + member("0.jpg", JPEG) + END))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(row["reason"], row["detail"]) for row in rows] == [("unsupported", "a sparse member")]
    assert peak < 8 * len(headers) + (4 << 20)


def test_half_a_surrogate_pair_in_a_sidecar_is_text_that_a_table_can_hold() -> None:
    [row] = rows_of(read_tar(member("0.jpg", JPEG) + member("0.json", rb'{"text": "a\ud800b"}') + END))
    assert row["text"] == r"a\ud800b"


def test_heavy_texts_beside_images_make_short_blocks() -> None:
    samples = (member(f"{number}.jpg", JPEG) + member(f"{number}.text", b"x" * (10 << 20)) for number in range(8))
    tables = read_tar(b"".join(samples) + END)
    assert [table.num_rows for table in tables] == [3, 3, 2]


def test_a_sample_without_end_is_one_reject() -> None:
    rows = rows_of(read_tar(b"".join(member(f"0.{number}x", b"") for number in range(10_001)) + END))
    assert [row["reason"] for row in rows] == ["corrupt"]
    assert "more than 10,000 members share the key 0" in rows[0]["detail"]


def test_no_member_of_a_tar_touches_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["../out.jpg", "/tmp/out.jpg", "a/../../out.jpg", "~/out.jpg"]
    links = [member(f"{kind!r}.jpg", b"", kind=kind) for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE)]
    rows = rows_of(read_tar(b"".join(member(name, JPEG) for name in names) + b"".join(links) + END))
    assert [row["reason"] for row in rows] == [None] * 4 + ["unsupported"] * 3
    assert not list(tmp_path.parent.glob("**/out.jpg"))
    assert not Path("/tmp/out.jpg").exists()


# -- tables


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


class _Claimed(pa.ExtensionType):
    """A column type that a file says it has: a name that Ray or Arrow knows, with metadata of the enemy's own."""

    def __init__(self, storage: pa.DataType, name: str, metadata: bytes) -> None:
        self._metadata = metadata
        super().__init__(storage, name)

    def __arrow_ext_serialize__(self) -> bytes:
        return self._metadata


def _odd(value: object, kind: _Claimed) -> pa.Array:
    return pa.ExtensionArray.from_storage(kind, pa.array([value], kind.storage_type))


def _read_table(path: Path, odd: pa.Array) -> pa.Table:
    """Write a table with an odd column beside its image, and return what reading both gives."""
    pq.write_table(pa.table({"image": pa.array([JPEG]), "odd": odd}), path / "t.parquet")
    config, run = InputConfig(image_column="image", keep_columns=("odd",)), str(path / "run")
    frozen = freeze(str(path / "t.parquet"), config, run)
    return pa.concat_tables(read_unit(frozen.units[0], frozen.columns, config, run_folder=run))


@pytest.mark.parametrize(
    "name", ["ray.data.arrow_tensor", "ray.data.arrow_tensor_v2", "ray.data.arrow_variable_shaped_tensor"]
)
@pytest.mark.parametrize("metadata", [b"5", b"null", b"\x80", b"[" * 100_000, b"pickle"])
def test_a_column_type_made_up_to_break_ray_is_read_as_its_storage(tmp_path: Path, name: str, metadata: bytes) -> None:
    metadata = pickle.dumps(_Bomb(tmp_path / "exploded")) if metadata == b"pickle" else metadata
    read = _read_table(tmp_path, _odd([1], _Claimed(pa.list_(pa.int64()), name, metadata)))
    assert read["odd"].to_pylist() == [[1]]
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["ray.data.arrow_pickled_object", "arrow.py_extension_type"])
@pytest.mark.parametrize("nesting", ["plain", "struct", "list", "large list", "fixed list", "map"])
def test_a_pickle_in_a_column_stays_bytes(tmp_path: Path, name: str, nesting: str) -> None:
    bomb = pickle.dumps(_Bomb(tmp_path / "exploded"))
    plain = _odd(bomb, _Claimed(pa.large_binary(), name, bomb))
    wrapped = {
        "plain": (plain, bomb),
        "struct": (pa.StructArray.from_arrays([plain], ["in"]), {"in": bomb}),
        "list": (pa.ListArray.from_arrays([0, 1], plain), [bomb]),
        "large list": (pa.LargeListArray.from_arrays([0, 1], plain), [bomb]),
        "fixed list": (pa.FixedSizeListArray.from_arrays(plain, 1), [bomb]),
        "map": (pa.MapArray.from_arrays([0, 1], pa.array(["key"]), plain), [("key", bomb)]),
    }
    odd, expected = wrapped[nesting]
    read = _read_table(tmp_path, odd)
    assert "extension" not in str(read.schema.field("odd").type)
    [row] = read.to_pylist()
    assert (row["data"], row["odd"]) == (JPEG, expected)
    assert not (tmp_path / "exploded").exists()


_UNPICKLE = """
import sys, pickle, pathlib
import pyarrow as pa, pyarrow.parquet as pq
from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray, ArrowPythonObjectType

class Bomb:
    def __reduce__(self):
        return pathlib.Path.touch, (folder / "exploded",)

folder = pathlib.Path(sys.argv[1])
bombs = ArrowPythonObjectArray.from_objects([Bomb()])
pq.write_table(pa.table({"image_id": ["a"], "caption": pa.ListArray.from_arrays([0, 1], bombs)}), folder / "l.parquet")

from captioner.config import InputConfig
from captioner.inputs import freeze, load_frozen
from captioner.evaluation.caption_files import read_captions
from captioner.storage.parquet import open_parquet_file

(folder / "a.jpg").write_bytes(b"x")
freeze(str(folder / "a.jpg"), InputConfig(), str(folder / "run"))
units = pq.read_table(folder / "run/units.parquet")
metadata = units.schema.metadata
pq.write_table(units.append_column("more", bombs).replace_schema_metadata(metadata), folder / "run/units.parquet")
print(load_frozen(str(folder / "run")).num_images)
try:
    list(read_captions(str(folder / "l.parquet")))
except Exception as error:
    print(type(error).__name__)
print((folder / "exploded").exists())
pq.read_table(folder / "l.parquet").to_pylist()
print((folder / "exploded").exists())
"""


def test_no_file_makes_a_process_unpickle_that_has_imported_ray_data(tmp_path: Path) -> None:
    """The last line shows that the file would have run code, had Arrow been asked alone."""
    child = subprocess.run(
        [sys.executable, "-c", _UNPICKLE, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
    )
    assert child.stdout.split() == ["1", "InputError", "False", "True"], child.stderr


_READ = """
import sys
from captioner.config import InputConfig
from captioner.inputs import freeze, read_unit
path, run = sys.argv[1:]
config = InputConfig(image_column="image")
frozen = freeze(path, config, run)
tables = read_unit(frozen.units[0], frozen.columns, config, run_folder=run)
print([row["reason"] for table in tables for row in table.to_pylist()])
"""


def test_a_column_that_lies_about_its_type_ends_no_process(tmp_path: Path) -> None:
    """Arrow 26 calls std::terminate when Python asks about this column: it must not be asked."""
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": [JPEG, JPEG], "other": [JPEG, JPEG]}), path)
    head, bytes_column, tail = path.read_bytes().rpartition(b"\x15\x0c\x25")  # SchemaElement.type of the last column
    assert bytes_column, "Arrow writes its footers in another way now"
    path.write_bytes(head + b"\x15\x04\x25" + tail)
    child = subprocess.run(
        [sys.executable, "-c", _READ, str(path), str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
    )
    assert child.stdout.strip() == "[None, None]", child.stderr


# -- addresses


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.9.9.9", "0.0.0.0", "169.254.169.254", "::1", "::", "fe80::1%eth0", "ff02::1"),
        *("::ffff:127.0.0.1", "::ffff:a9fe:a9fe", "::127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::"),
        *("fd00:ec2::254", "100.100.100.200", "168.63.129.16", "localhost", "x.localhost"),
    ],
)
def test_an_inner_address_is_known_in_any_notation(host: str) -> None:
    assert hosts.is_inner(host)


@pytest.mark.parametrize(
    "host", ["8.8.8.8", "10.0.0.1", "192.168.1.1", "2001:4860::8888", "example.com", "", "::2:0:1"]
)
def test_what_lies_outside_or_in_a_private_net_is_no_inner_address(host: str) -> None:
    assert not hosts.is_inner(host)


@pytest.mark.parametrize(
    "uri",
    [
        *("http://127.1:PORT/", "http://2130706433:PORT/", "http://0x7f000001:PORT/", "http://0177.0.0.1:PORT/"),
        *("http://127.0.0.1.:PORT/", "http://[::ffff:7f00:1]:PORT/", "HTTP://127.0.0.1:PORT/", "http://0:PORT/"),
        *("http://user@127.0.0.1:PORT/", "http://a:b@127.0.0.1:PORT/", "http://example.com@127.0.0.1:PORT/"),
        *("http:\\\\127.0.0.1:PORT/", "http://127.0.0.1:PORT\\@example.com/", "http://127.0.0.1:PORT#@example.com/"),
        *(
            "http://%6c%6fcalhost:PORT/",
            "http://①②⑦.0.0.1:PORT/",
            "http://127。0。0。1:PORT/",
            "http://\uff4cocalhost:PORT/",
        ),
        *("hdfs://127.0.0.1:PORT/", "http://127.0.0.1:PORT/../x", "ftp://127.0.0.1:PORT/", "ws://127.0.0.1:PORT/"),
        *("blockcache::http://127.0.0.1:PORT/", "tar://x::http://127.0.0.1:PORT/", "github://127.0.0.1:PORT/"),
    ],
)
def test_no_way_of_writing_it_leads_a_remote_list_inside(uri: str, enemy: "_Enemy") -> None:
    uri = uri.replace("PORT", str(enemy.server_port))
    [outcome] = Fetcher("s3://bucket/list.txt", InputConfig(), ImageConfig(fetch_retries=0)).fetch([uri])
    assert isinstance(outcome, Reject)
    assert not enemy.seen


@pytest.mark.parametrize(
    "uri",
    [
        *("SECRET", "file://SECRET", "file:SECRET", "FILE://SECRET", "local://SECRET", "file+percent://SECRET"),
        *("../../../../../../../../../../SECRET", "s3://../../../../SECRET", "~/../../../../SECRET", "\tfile://SECRET"),
        *("simplecache::file://SECRET", "zip://x::file://SECRET", "reference://SECRET", "dir::SECRET", "dask://SECRET"),
        *(
            "s3:///../SECRET",
            "file://localhostSECRET",
            "data:SECRET",
            "memory://../../../SECRET",
            "libarchive://SECRET",
        ),
    ],
)
def test_no_way_of_writing_it_leads_a_remote_list_to_a_local_file(uri: str, tmp_path: Path, enemy: "_Enemy") -> None:
    """The list is taken the whole way: its URIs are resolved before they are fetched."""
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"local")
    fetcher = Fetcher(f"{enemy.url}/lists/list.txt", InputConfig(), ImageConfig(fetch_retries=0, fetch_timeout_s=5))
    [outcome] = fetcher.fetch([urls.resolve(uri.replace("SECRET", str(secret)), f"{enemy.url}/lists")])
    assert outcome != b"local"


class _Enemy(ThreadingHTTPServer):
    """A server of lists and images that sends whoever asks elsewhere, and notes what was asked with which headers."""

    daemon_threads = True
    location = ""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        assert isinstance(self.server, _Enemy)
        self.server.seen.append((self.path, dict(self.headers)))
        is_moved = self.path.startswith("/moved")
        body = b"" if is_moved else b"secret"
        self.send_response(302 if is_moved else 200)
        if is_moved:
            self.send_header("Location", self.server.location)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 - the name that the standard library looks for

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def enemy() -> Iterator[_Enemy]:
    server = _Enemy()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_input_on_a_web_server_is_not_followed_inside(
    enemy: _Enemy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server itself is let through as if it were public; the address it sends to is not."""
    monkeypatch.setattr(hosts, "is_inner", lambda host: host == "127.0.0.3")
    monkeypatch.setattr(hosts, "is_own", lambda address: False)
    enemy.location = f"http://127.0.0.3:{enemy.server_port}/credentials"
    for name in ("list.txt", "images.parquet", "shard.tar"):
        with pytest.raises(InputError, match=r"cannot be listed: .*loopback or link-local"):
            freeze(f"{enemy.url}/moved-{name}", InputConfig(), str(tmp_path / "run"))
    assert {path for path, _ in enemy.seen} == {"/moved-list.txt", "/moved-images.parquet", "/moved-shard.tar"}


def test_a_list_may_point_to_its_own_server_but_to_no_other_port_of_it(enemy: _Enemy) -> None:
    other = f"http://127.0.0.1:{enemy.server_port + 1}/x"
    outcomes = Fetcher(f"{enemy.url}/list.txt", InputConfig(), ImageConfig()).fetch([f"{enemy.url}/x", other])
    assert outcomes[0] == b"secret"
    assert isinstance(outcomes[1], Reject)
    assert outcomes[1].reason == RejectReason.UNSAFE_URI


def test_denied_private_hosts_are_not_followed_from_any_list(enemy: _Enemy, tmp_path: Path) -> None:
    uris = ["http://10.0.0.1/x", "http://[fd12::1]/x", f"{enemy.url}/x"]
    access = InputConfig(deny_private_hosts=True)
    for listed, expected in ((str(tmp_path / "list.txt"), 3), (f"{enemy.url}/list.txt", 2)):
        outcomes = Fetcher(listed, access, ImageConfig(fetch_retries=0)).fetch(uris)
        refused = [outcome for outcome in outcomes if isinstance(outcome, Reject)]
        assert [outcome.reason for outcome in refused] == [RejectReason.UNSAFE_URI] * expected
        assert all("(--deny-private-hosts)" in outcome.detail for outcome in refused[:2])
    assert outcomes[2] == b"secret"


def test_a_job_tells_its_workers_which_addresses_its_input_has(enemy: _Enemy) -> None:
    job = resolve(CaptionJobConfig(input_path=f"{enemy.url}/list.txt", output="out"))
    assert job.config.input.home_addresses == ("127.0.0.1",)
    with pytest.raises(ConfigError, match="--deny-private-hosts is True; expected no --allow-local-uris beside it"):
        InputConfig(deny_private_hosts=True, allow_local_uris=True)
    config = replace(job.config.input, home_addresses=())  # had the driver found a public server there
    [outcome] = Fetcher(job.config.input_path, config, ImageConfig(fetch_retries=0)).fetch([f"{enemy.url}/x"])
    assert isinstance(outcome, Reject)
    with pytest.raises(StoreError, match="loopback or link-local"):
        select(job.config.input_path, config)


def test_headers_for_the_server_of_a_list_are_sent_to_no_other(enemy: _Enemy) -> None:
    login = {"headers": {"X-Api-Key": "s3cr3t"}, "client_kwargs": {"headers": {"Authorization": "s3cr3t"}}}
    access = InputConfig(storage_options=login, allow_local_uris=True)
    uris = [f"{enemy.url}/own", f"http://localhost:{enemy.server_port}/other"]
    assert Fetcher(f"{enemy.url}/list.txt", access, ImageConfig()).fetch(uris) == [b"secret"] * 2
    sent = {path: "s3cr3t" in str(headers) for path, headers in enemy.seen}
    assert sent == {"/own": True, "/other": False}


def test_headers_for_a_server_do_not_go_where_it_sends_us(enemy: _Enemy) -> None:
    enemy.location = f"http://localhost:{enemy.server_port}/stolen"
    login = {
        "headers": {"X-Api-Key": "s3cr3t"},
        "client_kwargs": {"headers": {"X-Token": "s3cr3t", "Cookie": "s3cr3t"}},
    }
    access = InputConfig(storage_options=login, allow_local_uris=True)
    assert Fetcher(f"{enemy.url}/list.txt", access, ImageConfig()).fetch([f"{enemy.url}/moved"]) == [b"secret"]
    sent = {path: [name for name, value in headers.items() if value == "s3cr3t"] for path, headers in enemy.seen}
    assert sent == {"/moved": ["X-Token", "Cookie", "X-Api-Key"], "/stolen": []}


# -- credentials


@pytest.mark.parametrize("url", ["s3://AKIA:s3cr3t@bucket/x", "gs://me:s3cr3t@bucket/x", "memory://me:s3cr3t@x/y"])
def test_credentials_in_a_url_that_takes_none_are_refused_unseen(url: str) -> None:
    with pytest.raises(InputError, match=r"://\*\*\*@.* holds credentials; pass them with --storage-options") as error:
        open_store(url)
    assert "s3cr3t" not in str(error.value)


def test_credentials_in_a_uri_of_a_list_are_not_in_its_reject() -> None:
    uris = ["s3://bucket/x", "s3://AKIA:s3cr3t@bucket/x"]
    access = InputConfig(storage_options={"key": "k", "secret": "s", "endpoint_url": "http://127.0.0.1:1"})
    for order in (uris, uris[::-1]):
        outcomes = Fetcher("s3://bucket/list.txt", access, ImageConfig(fetch_retries=0)).fetch(order)
        assert all(isinstance(outcome, Reject) for outcome in outcomes)
        assert "s3cr3t" not in str(outcomes)


def test_options_of_the_wrong_kind_are_an_error_that_does_not_show_them() -> None:
    with pytest.raises(InputError, match="config_kwargs of --storage-options is a str") as error:
        open_store("s3://bucket/x", {"config_kwargs": "s3cr3t"})
    assert "s3cr3t" not in str(error.value)


def test_a_store_around_a_store_is_refused_without_what_its_url_holds(tmp_path: Path) -> None:
    """Such a URL was taken for a local path, whose secrets were shown."""
    url = "simplecache::https://s3cr3t@host.example/x.jpg"
    with pytest.raises(InputError, match=r"simplecache::https://\*\*\*@host.example/x.jpg is a store around a store"):
        open_store(url)
    listed = urls.resolve(url, str(tmp_path))
    for source in (str(tmp_path / "list.txt"), "s3://bucket/list.txt"):
        [outcome] = Fetcher(source, InputConfig(), ImageConfig(fetch_retries=0)).fetch([listed])
        assert isinstance(outcome, Reject)
        assert "s3cr3t" not in outcome.detail + urls.shown(listed)
