"""Stores that never end: a listing or a list has a limit, and an error says which."""

import functools
import itertools
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from captioner.config import InputConfig
from captioner.errors import InputError
from captioner.inputs import freeze, text_files
from captioner.storage import S3Store, StoreError, as_location, fsspec_store, http_store, open_store
from tests.http_server import serving


class _Endless(BaseHTTPRequestHandler):
    """Every page is HTML with a link to a folder below it, then more links or lines without end."""

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain" if self.path.endswith(".txt") else "text/html")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        with suppress(OSError):  # the reader has had enough
            if self.path.startswith("/self/"):
                self.wfile.write(b'<a href="again/">again</a>')
                return
            while True:
                self.wfile.write(b'<a href="a.jpg">a.jpg</a>' * 10_000)


@pytest.fixture
def web() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Endless)
    server.daemon_threads = True
    with serving(server):
        yield f"http://127.0.0.1:{server.server_port}"


def test_a_page_of_links_that_never_ends_is_an_error(web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_store, "MAX_INDEX_BYTES", 1 << 20)
    with pytest.raises(InputError, match="the page of a folder has more than 1,048,576 bytes; pass a list"):
        freeze(f"{web}/folder/", InputConfig(), str(tmp_path / "run"))


def test_a_folder_that_holds_itself_is_an_error(web: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"it has folders 100 deep, .*/self/again/again/.*; does one hold itself"):
        freeze(f"{web}/self/", InputConfig(), str(tmp_path / "run"))


def test_a_list_without_end_is_an_error(web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its server gives no ranges, so that it is read to the disk first."""
    free = functools.partial(lambda _: type("Usage", (), {"free": 4 << 20}))
    monkeypatch.setattr(http_store.shutil, "disk_usage", free)
    with pytest.raises(InputError, match="more bytes than half of the temporary folder's disk"):
        freeze(f"{web}/list.txt", InputConfig(), str(tmp_path / "run"))


@pytest.mark.parametrize("name", ["list.txt", "list.csv"])
def test_a_line_without_end_is_an_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MAX_LINE_CHARS", 1 << 20)
    (tmp_path / name).write_text("url\n" + "x" * (1 << 20))
    with pytest.raises(InputError, match="line 2 of a list has 1,048,576 characters or more; expected a row a line"):
        freeze(str(tmp_path / name), InputConfig(), str(tmp_path / "run"))


@pytest.mark.parametrize("tokens", [["a", "a"], ["a", "b", "a"], ["a", None]])
def test_a_listing_that_repeats_its_continuation_token_is_an_error(
    tokens: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(tokens)

    def page(*_: Any) -> dict[str, Any]:
        token = next(answers)
        more = {} if token is None else {"NextContinuationToken": token}
        return {"Contents": [{"Key": "in/a.jpg", "Size": 1}], "IsTruncated": True, **more}

    store = open_store(as_location("s3://bucket/in/"))
    assert isinstance(store, S3Store)
    monkeypatch.setattr(store, "_page", page)
    with pytest.raises(StoreError, match="does not end: its server repeats a continuation token, or has none"):
        list(store.pages("s3://bucket/in/"))


class _Tree(_Endless):
    """Every folder holds two folders, and no file."""

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(b'<a href="a/">a</a><a href="b/">b</a>')


def test_a_tree_of_folders_without_end_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsspec_store, "MAX_BARREN", 50)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Tree)
    with serving(server), pytest.raises(InputError, match="no end: 51 folders or pages of it held 0 files; name a fol"):
        freeze(f"http://127.0.0.1:{server.server_port}/", InputConfig(), str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("keys_per_page", "why"),
    [
        (0, "151 folders or pages of it held 0 files"),
        (10, "it has more than 5,000 files"),
    ],
)
def test_a_listing_of_fresh_tokens_without_end_is_an_error(
    keys_per_page: int, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fsspec_store, "MAX_BARREN", 150)
    monkeypatch.setattr(fsspec_store, "MAX_FILES", 5000)
    numbers = itertools.count()

    def page(*_: Any) -> dict[str, Any]:
        keys = [{"Key": f"in/{next(numbers)}.jpg", "Size": 1} for _ in range(keys_per_page)]
        return {"Contents": keys, "IsTruncated": True, "NextContinuationToken": str(next(numbers))}

    store = open_store(as_location("s3://bucket/in/"))
    monkeypatch.setattr(store, "_page", page)
    with pytest.raises(StoreError, match=f"the listing of s3://bucket/in/ seems to have no end: {why}; name a folder"):
        for _ in store.pages("s3://bucket/in/"):
            pass
