"""What several rooms' tests share: how property tests draw their examples, and a real S3 server on loopback."""

import atexit
import gc
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests import hypothesis_profiles

hypothesis_profiles.load_profile()
_MEMORY = "/dev/shm"
if os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > 4 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", _MEMORY)  # each fsync, which makes parts durable, is 5 ms on a disk

_SERVER = """
import logging
from moto.server import DomainDispatcherApplication, create_backend_app
from moto.moto_server.werkzeug_app import MotoRequestHandler
from werkzeug.serving import make_server

logging.disable()
MotoRequestHandler.protocol_version = "HTTP/1.1"  # as a real store: connections stay open
app = DomainDispatcherApplication(create_backend_app)
server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=MotoRequestHandler)
print(server.port, flush=True)
server.serve_forever()
"""
_START_TIMEOUT_S = 60
_SLOW_TIMEOUT_S = 1800
_KEY, _SECRET = "AKIATESTKEY", "secret-of-the-test"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give slow tests a guard for a machine with other work, unless they name their own."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(_SLOW_TIMEOUT_S))


def pytest_configure() -> None:
    """Before anything is imported: a thread for torch, whose sums then have the same last bits on any number of cores,
    and no look for garbage until all is there, which takes a sixth of the time and finds none."""
    gc.disable()
    atexit.register(_end_without_a_report)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # of Ray's workers, which may have more


def pytest_collection_finish() -> None:
    """Keep what was imported out of each later garbage collection, which torch and transformers make 0.3 s long."""
    gc.collect()
    gc.freeze()
    gc.enable()


def _end_without_a_report() -> None:
    """Say no more: what was frozen is never freed, and DuckDB's binding would report each of its objects as leaked."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


@dataclass(frozen=True)
class S3Server:
    """A running S3 server; `storage_options` are what a user would pass to reach it."""

    endpoint: str
    storage_options: dict[str, Any] = field(repr=False)

    @property
    def environment(self) -> dict[str, str]:
        """The usual environment variables instead of storage options."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": _KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


@dataclass(frozen=True)
class Bucket:
    """An empty bucket of its own for one test."""

    server: S3Server
    name: str

    @property
    def url(self) -> str:
        return f"s3://{self.name}"

    @property
    def storage_options(self) -> dict[str, Any]:
        return self.server.storage_options

    @property
    def endpoint(self) -> str:
        return self.server.endpoint

    @property
    def environment(self) -> dict[str, str]:
        return self.server.environment

    @property
    def fs(self) -> Any:
        return fsspec.filesystem("s3", **self.storage_options, use_listings_cache=False)

    def put(self, key: str, data: bytes) -> str:
        """Store one object under exactly this key and return its URL."""
        self.fs.call_s3("put_object", Bucket=self.name, Key=key, Body=data)
        return f"{self.url}/{key}"


@contextmanager
def running_s3_server() -> Iterator[S3Server]:
    """A moto server in a process of its own, on a free port; ended by its pid."""
    process = subprocess.Popen([sys.executable, "-c", _SERVER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    try:
        endpoint = f"http://127.0.0.1:{int(process.stdout.readline())}"
        _wait_until_up(endpoint)
        options = {
            "key": _KEY,
            "secret": _SECRET,
            "endpoint_url": endpoint,
            "client_kwargs": {"region_name": "us-east-1"},
        }
        yield S3Server(endpoint, options)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


JobHere = Callable[..., "subprocess.CompletedProcess[str]"]
"""Runs a script of jobs/ with its arguments in the process of the test."""


@pytest.fixture
def job_here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[JobHere]:
    """A job as a person starts it, but for the second that a process of its own takes to import what it needs."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        words = [str(Path(__file__).parents[1] / "jobs" / script), *arguments]
        monkeypatch.setattr("sys.argv", words)
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(words[0], run_name="__main__")
        assert isinstance(ended.value.code, int)
        return subprocess.CompletedProcess(words, ended.value.code, *capfd.readouterr())

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def kept_decode_children() -> Iterator[None]:
    """The tests of a file share decode children; see `tests.decode_children`."""
    from tests.decode_children import kept_decode_children  # here, not above: most tests decode nothing

    with kept_decode_children():
        yield


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """That server, for all tests of a run."""
    with running_s3_server() as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server) -> Bucket:
    """An empty bucket on the S3 server."""
    bucket = Bucket(s3_server, f"bucket-{uuid.uuid4().hex[:12]}")
    bucket.fs.call_s3("create_bucket", Bucket=bucket.name)
    return bucket


def _wait_until_up(endpoint: str) -> None:
    give_up = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            urllib.request.urlopen(endpoint, timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < give_up, f"no S3 server at {endpoint}"
            time.sleep(0.1)
