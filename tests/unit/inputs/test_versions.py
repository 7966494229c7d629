"""What a store says of an object without giving it: another text once the object is another."""

import functools
import os
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from captioner.config import ImageConfig, InputConfig
from captioner.inputs import Fetcher
from captioner.schema import Reject, RejectReason

LOCAL = InputConfig(allow_local_uris=True)


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *words: object) -> None:
        pass


class HeadlessHandler(Handler):
    def do_HEAD(self) -> None:
        self.send_error(405)


def served(folder: Path, handler: type[Handler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    yield from served(tmp_path, Handler)


@pytest.fixture
def headless_site(tmp_path: Path) -> Iterator[str]:
    yield from served(tmp_path, HeadlessHandler)


def versions(folder: str, *names: str) -> list[str | Reject]:
    return Fetcher(folder, LOCAL, ImageConfig(fetch_retries=0)).versions([f"{folder}/{name}" for name in names])


def write(path: Path, data: bytes, time_s: int) -> None:
    path.write_bytes(data)
    os.utime(path, (time_s, time_s))


@pytest.mark.parametrize("store", ["local", "http"])
def test_a_stamp_stays_until_content_or_time_change(store: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = str(tmp_path) if store == "local" else request.getfixturevalue("site")
    write(tmp_path / "a.jpg", b"first", 1_000_000)
    [first], [again] = versions(folder, "a.jpg"), versions(folder, "a.jpg")
    assert first == again != ""
    write(tmp_path / "a.jpg", b"other", 2_000_000)
    [touched] = versions(folder, "a.jpg")
    write(tmp_path / "a.jpg", b"longer", 2_000_000)
    [longer] = versions(folder, "a.jpg")
    assert len({first, touched, longer}) == 3


def test_a_stamp_in_memory_changes_with_each_write() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/versions/a.jpg", b"first")
    [first] = versions("memory://versions", "a.jpg")
    memory.pipe_file("/versions/a.jpg", b"other")
    assert versions("memory://versions", "a.jpg") != [first]


@pytest.mark.parametrize("store", ["local", "http", "memory"])
def test_what_is_not_there_has_a_reject_for_a_stamp(store: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folders = {"local": str(tmp_path), "memory": "memory://nowhere"}
    folder = folders.get(store) or request.getfixturevalue("site")
    (tmp_path / "there.jpg").touch()
    [found] = versions(folder, "gone.jpg")
    assert isinstance(found, Reject)
    assert found.reason == RejectReason.MISSING


def test_a_folder_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    assert versions(str(tmp_path), "sub") == [
        Reject(RejectReason.MISSING, "not a file but a folder, a device or a pipe")
    ]


def test_a_server_that_answers_no_head_says_nothing(tmp_path: Path, headless_site: str) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    assert versions(headless_site, "a.jpg") == [""]


def test_a_remote_list_learns_nothing_of_local_files(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    [found] = Fetcher("s3://bucket/list.csv", InputConfig(), ImageConfig()).versions([f"{tmp_path}/a.jpg"])
    assert isinstance(found, Reject)
    assert found.reason == RejectReason.UNSAFE_URI
