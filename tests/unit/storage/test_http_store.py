import functools
import gzip
import io
import tarfile
import threading
from http.server import ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.config import ImageConfig, InputConfig
from captioner.errors import InputError, JobError
from captioner.inputs import Fetcher, freeze, read_unit
from captioner.storage import open_store
from tests.http_server import PlainFolder, RangedFolder


@pytest.fixture(params=[PlainFolder, RangedFolder], ids=["plain", "ranged"])
def web(request, tmp_path):
    """A folder and the address that it is served at."""
    root = tmp_path / "www"
    root.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(request.param, directory=str(root)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield root, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def run(tmp_path):
    return str(tmp_path / "out/_run")


def _rows(path, run, config=InputConfig()):  # noqa: B008
    frozen = freeze(path, config, run)
    tables = [t for unit in frozen.units for t in read_unit(unit, frozen.columns, config, run_folder=run)]
    return pa.concat_tables(tables).to_pylist()


def test_a_folder_is_listed_by_its_links(web, run):
    root, url = web
    (root / "in/sub").mkdir(parents=True)
    names = ["#1.jpg", "100%.jpg", "a b.jpg", "sub/c.jpg", "ü.png"]
    for name in [*names, "x.json"]:
        (root / "in" / name).write_bytes(name.encode())
    rows = _rows(f"{url}/in/", run)
    outcomes = Fetcher(f"{url}/in/", InputConfig(), ImageConfig()).fetch([row["uri"] for row in rows])
    assert sorted(outcome.decode() for outcome in outcomes) == sorted(
        ["a b.jpg", "100%.jpg", "#1.jpg", "ü.png", "sub/c.jpg"]
    )


def test_links_that_lead_out_of_a_folder_are_not_in_it(web):
    root, url = web
    (root / "in").mkdir()
    links = [f"{url}/in/{name}" for name in ("a.jpg", "../b.jpg", "%2e%2e/c.jpg", "x/../../d.jpg", "/etc/e.jpg")]
    (root / "in/index.html").write_text("".join(f'<a href="{link}">x</a>' for link in links))
    assert [entry.url for page in open_store(url).pages(f"{url}/in/") for entry in page] == [f"{url}/in/a.jpg"]


def test_one_file_a_list_and_braces_are_read(web, run):
    root, url = web
    (root / "0.jpg").write_bytes(b"x")
    (root / "list.txt").write_text("0.jpg\nhttps://elsewhere.example/1.jpg\n")
    assert [row["uri"] for row in _rows(f"{url}/0.jpg", run)] == [f"{url}/0.jpg"]
    assert [row["uri"] for row in _rows(f"{url}/list.txt", run)] == [f"{url}/0.jpg", "https://elsewhere.example/1.jpg"]
    assert [row["uri"] for row in _rows(f"{url}/{{0..1}}.jpg", run)] == [f"{url}/0.jpg", f"{url}/1.jpg"]


def test_tables_and_tars_are_read(web, run):
    root, url = web
    images = [bytes([n]) * 100_000 for n in range(20)]
    pq.write_table(pa.table({"image": images}), root / "t.parquet", row_group_size=7, compression="none")
    assert [row["data"] for row in _rows(f"{url}/t.parquet", run)] == images
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number, image in enumerate(images):
            info = tarfile.TarInfo(f"{number:02d}.jpg")
            info.size = len(image)
            tar.addfile(info, io.BytesIO(image))
    (root / "0.tar").write_bytes(buffer.getvalue())
    (root / "1.tar").write_bytes(gzip.compress(buffer.getvalue()))
    assert [row["data"] for row in _rows(f"{url}/{{0,1}}.tar", run)] == images * 2


def test_what_is_not_there_is_an_error(web, run):
    _, url = web
    with pytest.raises(InputError, match=r"/nope.jpg does not exist"):
        freeze(f"{url}/nope.jpg", InputConfig(), run)
    with pytest.raises(InputError, match=r"is empty, or matches nothing"):
        freeze(f"{url}/", InputConfig(), run)


def test_a_reader_seeks_whether_the_server_gives_ranges_or_not(web):
    root, url = web
    (root / "x").write_bytes(bytes(range(256)) * 1000)
    with open_store(url).open(f"{url}/x") as file:
        file.seek(-10, 2)
        assert file.read() == bytes(range(246, 256))
        file.seek(256 * 500)
        assert file.read(3) == b"\0\1\2"


def test_a_server_that_is_down_is_not_taken_for_a_file_that_is_missing(run, monkeypatch):
    monkeypatch.setattr("captioner.storage.fsspec_store.pause_s", lambda *_: 0)
    with pytest.raises(JobError, match=r"http://127.0.0.1:1/x.parquet cannot be listed: .*Cannot connect"):
        freeze("http://127.0.0.1:1/x.parquet", InputConfig(), run)
