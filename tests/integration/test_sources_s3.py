import gzip
import io
import os
import pickle
import subprocess
import sys
import tarfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.config import ImageConfig, InputConfig
from captioner.errors import InputError
from captioner.inputs import Fetcher, count_images, freeze, load_frozen, read_unit
from captioner.schema import Reject, RejectReason
from captioner.storage import Location, open_store
from captioner.storage.faults import StoreError
from tests.http_server import serving

ODD_NAMES = ["a b.jpg", "ü.jpg", "50%.jpg", "%20.jpg", "#1.jpg", "q?.jpg", "{a,b}.jpg", "*.jpg", "[x].jpg", "a::b.jpg"]
ODD_NAMES += ["'\".jpg", "~.jpg", "a+b&c=d.jpg", "/double.jpg", "v?versionId=3.jpg", "end .jpg", "back\\slash.jpg"]


def _config(s3, **options):
    return InputConfig(storage_options=s3.storage_options, **options)


def _rows(s3, path, config, run):
    frozen = freeze(path, config, Location(run, s3.storage_options))
    tables = [
        table
        for unit in frozen.units
        for table in read_unit(unit, frozen.columns, config, run_folder=Location(run, s3.storage_options))
    ]
    return pa.concat_tables(tables).to_pylist()


def _parquet(table):
    buffer = io.BytesIO()
    pq.write_table(pa.table(table), buffer, row_group_size=2)
    return buffer.getvalue()


def _tar(num):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for n in range(num):
            info = tarfile.TarInfo(f"{n}.jpg")
            info.size = 1000
            tar.addfile(info, io.BytesIO(bytes([n]) * 1000))
    return buffer.getvalue()


@pytest.fixture
def run(s3):
    return f"{s3.url}/out/_run"


def test_a_prefix_of_odd_names_is_listed_and_every_object_fetched(s3, run):
    for name in ODD_NAMES:
        s3.put(f"in/{name}", name.encode())
    s3.put("in/", b"")
    s3.put("in/sub/", b"")
    s3.put("in/x.json", b"")
    config = _config(s3)
    rows = _rows(s3, f"{s3.url}/in", config, run)
    assert sorted(row["uri"] for row in rows) == sorted(f"{s3.url}/in/{name}" for name in ODD_NAMES)
    outcomes = Fetcher(f"{s3.url}/in", config, ImageConfig()).fetch([row["uri"] for row in rows])
    assert [f"{s3.url}/in/{outcome.decode()}" for outcome in outcomes] == [row["uri"] for row in rows]
    assert load_frozen(Location(run, s3.storage_options)).skipped == {"folder marker": 2, ".json": 1}


@pytest.mark.parametrize("name", [name for name in ODD_NAMES if not name.startswith("/")])
def test_one_object_with_an_odd_name_is_taken_literally(s3, run, name):
    url = s3.put(f"in/{name}", b"x")
    s3.put("in/other.jpg", b"x")
    assert [row["uri"] for row in _rows(s3, url, _config(s3), run)] == [url]


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("", ["a/1.jpg", "a/b/2.jpg", "ab.jpg"]),
        ("a", ["a/1.jpg", "a/b/2.jpg"]),
        ("a/", ["a/1.jpg", "a/b/2.jpg"]),
        ("ab", ["ab.jpg"]),
        ("a*", ["ab.jpg"]),
        ("a/**", ["a/1.jpg", "a/b/2.jpg"]),
        ("**/*.jpg", ["a/1.jpg", "a/b/2.jpg", "ab.jpg"]),
        ("a/{1,9}.jpg", ["a/1.jpg", "a/9.jpg"]),
    ],
)
def test_prefixes_globs_and_braces_select_what_they_say(s3, run, path, names):
    for name in ["a/1.jpg", "a/b/2.jpg", "ab.jpg"]:
        s3.put(name, b"x")
    rows = _rows(s3, f"{s3.url}/{path}".rstrip("/") + "/" * path.endswith("/"), _config(s3), run)
    assert [row["uri"] for row in rows] == [f"{s3.url}/{name}" for name in names]


def test_parquet_is_read_from_the_bucket(s3, run):
    table = {"image": [b"a" * 100_000, b"b", None], "id": ["x", "y", "z"]}
    for shard in range(2):
        s3.put(f"in/{shard}.parquet", _parquet(table))
    rows = _rows(s3, f"{s3.url}/in", _config(s3, id_column="id"), run)
    assert [row["image_id"] for row in rows] == ["x", "y", "z"] * 2
    assert [row["data"] for row in rows] == table["image"] * 2


def test_tars_are_read_from_the_bucket(s3, run):
    s3.put("in/0.tar", _tar(3))
    s3.put("in/1.tar.gz", gzip.compress(_tar(2)))
    config = _config(s3)
    rows = _rows(s3, f"{s3.url}/in", config, run)
    assert [row["data"] for row in rows] == [bytes([n]) * 1000 for n in (0, 1, 2, 0, 1)]
    frozen = load_frozen(Location(run, s3.storage_options))
    assert [count_images(unit, frozen.columns, config) for unit in frozen.units] == [3, 2]


def test_a_list_in_the_bucket_points_beside_itself_and_elsewhere_but_not_inside(s3, run):
    s3.put("lists/a.csv", b"url\nimg/1.jpg\n../2.jpg\n/etc/passwd\nhttp://169.254.169.254/x\ngone.jpg\n")
    s3.put("lists/img/1.jpg", b"one")
    s3.put("2.jpg", b"two")
    config = _config(s3)
    rows = _rows(s3, f"{s3.url}/lists/a.csv", config, run)
    outcomes = Fetcher(f"{s3.url}/lists/a.csv", config, ImageConfig()).fetch([row["uri"] for row in rows])
    assert outcomes[:2] == [b"one", b"two"]
    assert [outcome.reason for outcome in outcomes[2:]] == ["unsafe_uri", "unsafe_uri", "missing"]


def test_a_local_list_points_into_the_bucket(s3, tmp_path):
    (tmp_path / "list.txt").write_text(s3.put("a.jpg", b"a") + "\n")
    config = _config(s3)
    run = str(tmp_path / "out/_run")
    frozen = freeze(str(tmp_path / "list.txt"), config, run)
    uris = next(read_unit(frozen.units[0], frozen.columns, config, run_folder=run))["uri"].to_pylist()
    assert Fetcher(str(tmp_path / "list.txt"), config, ImageConfig()).fetch(uris) == [b"a"]


def test_the_usual_environment_variables_take_the_place_of_options(s3):
    s3.put("in/a.jpg", b"from the bucket")
    program = f"""
from captioner.config import ImageConfig, InputConfig
from captioner.inputs import Fetcher, freeze
frozen = freeze({s3.url!r}, InputConfig(), {s3.url + "/out/_run"!r})
print(frozen.num_images, Fetcher({s3.url!r}, InputConfig(), ImageConfig()).fetch([{s3.url + "/in/a.jpg"!r}]))
"""
    environment = {**os.environ, **s3.environment, "AWS_EC2_METADATA_DISABLED": "true"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "1 [b'from the bucket']\n", done.stderr


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nothing-here", r"/nothing-here does not exist; expected a file, a folder or prefix"),
        ("/nothing/*.jpg", r"is empty, or matches nothing"),
        ("-no-such-bucket/x", r"cannot be listed: HTTP 404, .*bucket does not exist"),
    ],
)
def test_a_missing_input_is_an_error_before_anything_is_written(s3, path, message):
    with pytest.raises(InputError, match=message):
        freeze(s3.url + path, _config(s3), Location(f"{s3.url}/out/_run", s3.storage_options))
    assert open_store(s3.url, s3.storage_options).names(f"{s3.url}/out/_run") == []


def test_an_upload_is_whole_or_absent(s3):
    store = open_store(s3.url, s3.storage_options)
    url = f"{s3.url}/out/a b#1.parquet"
    store.write_atomic(url, b"first")
    store.write_atomic(url, b"second")
    assert store.read_bytes(url) == b"second"
    assert store.names(f"{s3.url}/out") == ["a b#1.parquet"]
    with pytest.raises(StoreError, match="missing"):
        store.write_atomic("s3://no-such-bucket-at-all/x", b"x")
    store.remove(url)
    store.remove(url)
    assert store.info(url) is None
    assert store.read_or_none(url) is None
    with pytest.raises(StoreError, match="bucket does not exist"):
        store.read_or_none("s3://no-such-bucket-at-all/x")


def test_a_file_that_may_be_missing_is_looked_up_and_read_by_one_request(s3, monkeypatch):
    store = open_store(s3.url, s3.storage_options)
    there, call, asked = s3.put("there", b"x"), store.fs._call_s3, []

    def counted(method, *args, **kwargs):
        asked.append(method)
        return call(method, *args, **kwargs)

    monkeypatch.setattr(store.fs, "_call_s3", counted)
    assert (store.read_or_none(there), store.read_or_none(f"{s3.url}/not-there")) == (b"x", None)
    assert asked == ["get_object"] * 2


def test_a_listing_shows_the_folder_as_it_is_now(s3):
    store = open_store(s3.url, s3.storage_options)
    s3.put("out/a", b"")
    assert store.names(f"{s3.url}/out") == ["a"]
    s3.put("out/b", b"")  # by another hand
    assert store.names(f"{s3.url}/out") == ["a", "b"]


def test_a_fetcher_serves_threads_and_other_processes_at_once(s3):
    uris = [s3.put(f"{n}.jpg", str(n).encode()) for n in range(20)]
    fetcher = pickle.loads(pickle.dumps(Fetcher(s3.url, _config(s3), ImageConfig(fetch_concurrency=8))))
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(fetcher.fetch, [uris] * 4))
    assert results == [[str(n).encode() for n in range(20)]] * 4
    assert not any(isinstance(outcome, Reject) for outcome in results[0])


class _Listing(BaseHTTPRequestHandler):
    """An S3 whose bucket holds as many objects as its prefix says, made up page by page."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self._answer(404, b"")

    def do_GET(self):
        query = parse_qs(urlsplit(self.path).query)
        prefix = query["prefix"][0]
        num, start = int(prefix.strip("/")), int(query.get("continuation-token", ["0"])[0])
        stop = min(num, start + int(query["max-keys"][0]))
        item = "<Contents><Key>{}{:08d}.jpg</Key><Size>1</Size></Contents>"
        items = "".join(item.format(prefix, number) for number in range(start, stop))
        more = (
            f"<IsTruncated>{str(stop < num).lower()}</IsTruncated><NextContinuationToken>{stop}</NextContinuationToken>"
        )
        self._answer(200, f"<ListBucketResult>{items}{more}</ListBucketResult>".encode())

    def _answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def endless_bucket():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Listing)
    login = {"key": "k", "secret": "s", "client_kwargs": {"region_name": "us-east-1"}}
    with serving(server):
        yield {"endpoint_url": f"http://127.0.0.1:{server.server_port}", **login}


def test_a_listing_five_times_as_long_takes_no_more_memory(endless_bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("captioner.inputs.listing.ROWS_PER_LISTING", 1_000)

    def peak_bytes(num, told):
        tracemalloc.start()
        try:
            config = InputConfig(storage_options=endless_bucket)
            assert freeze(f"s3://b/{num}", config, f"{tmp_path}/{num}", on_progress=told.append).num_images == num
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak_bytes(100, [])  # what is loaded once
    told = []
    assert peak_bytes(10_000, told) < 1.2 * peak_bytes(2_000, [])
    assert told == list(range(1_000, 10_001, 1_000))


def test_a_listing_stamps_objects_as_asking_for_each_does(s3):
    uris = [s3.put(f"many/{number:03}.jpg", b"x" * number) for number in range(120)]
    few = Fetcher(f"{s3.url}/many", _config(s3), ImageConfig())
    alone = [few.versions([uri])[0] for uri in uris[:3]]
    *found, missing, other = few.versions([*uris, f"{s3.url}/many/gone.jpg", s3.put("elsewhere.jpg", b"y")])
    assert found[:3] == alone
    assert len(set(found)) == 120
    assert missing.reason == RejectReason.MISSING
    assert other
    s3.put("many/007.jpg", b"z" * 7)
    again = few.versions(uris)
    assert [uri for uri, version, before in zip(uris, again, found, strict=True) if version != before] == [uris[7]]
