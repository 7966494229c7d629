"""An HTTP proxy between a job and its store that does to its requests what networks and stores do on a bad day.

with FaultingProxy(endpoint) as proxy:
    proxy.weather = Weather(seed=1, share=0.1)             # a tenth of all requests meets some fault
    proxy.outage = Outage("expired", "PUT", "/bucket/table")   # and these meet one always, until it is taken away
    ... proxy.endpoint ...
    proxy.injected    # what it did, by kind; a test that finds nothing here has shown nothing
"""

import http.client
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import urlsplit

KINDS = ("throttled", "reset", "hung", "short", "expired")
_HOP = {"connection", "transfer-encoding", "expect", "keep-alive", "content-length"}
_ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>{}</Message></Error>"


@dataclass
class Weather:
    """Faults at random: `share` of the requests under `prefix`, of the given kinds, in bursts of a few. One request
    that is tried again and again meets no more than a burst: two in a row would outlast any number of tries."""

    seed: int
    share: float
    kinds: Sequence[str] = KINDS
    prefix: str = "/"
    methods: Sequence[str] = ("GET", "PUT", "HEAD", "POST", "DELETE")
    burst: int = 3

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._left: list[str] = []
        self._in_a_row: Counter[tuple[str, str]] = Counter()

    def fault(self, method: str, path: str) -> str | None:
        if method not in self.methods or not path.startswith(self.prefix):
            return None
        if not self._left and self._random.random() < self.share / self.burst:
            self._left = [self._random.choice(list(self.kinds))] * self.burst
        if not self._left or self._in_a_row[method, path] == self.burst:
            del self._in_a_row[method, path]
            return None
        self._in_a_row[method, path] += 1
        return self._left.pop()


@dataclass(frozen=True)
class Outage:
    """One fault for every request of a method below a prefix."""

    kind: str
    methods: Sequence[str]
    prefix: str

    def fault(self, method: str, path: str) -> str | None:
        return self.kind if method in self.methods and path.startswith(self.prefix) else None


@dataclass
class FaultingProxy:
    """Passes requests on to `upstream`, but for those that meet a fault."""

    upstream: str
    weather: Sequence[Weather | Outage] = ()
    injected: Counter[str] = field(default_factory=Counter)
    num_passed: int = 0

    def __post_init__(self) -> None:
        self.lock, self.released = threading.Lock(), threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    def fault(self, method: str, path: str) -> str | None:
        """Decide on one request, and count it."""
        with self.lock:
            kind = next((kind for rule in self.weather if (kind := rule.fault(method, path))), None)
            if kind:
                self.injected[kind] += 1
            else:
                self.num_passed += 1
            return kind

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    proxy: FaultingProxy

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: broken connections are what this server is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits for the receipt of its headers, which comes 40 ms later
    server: _Server

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        proxy = self.server.proxy
        fault = proxy.fault(self.command, self.path)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
        elif fault == "hung":
            self.close_connection = True
            proxy.released.wait(60)
        elif fault == "throttled":
            self._send(503, {}, _ERROR.format("SlowDown", "Reduce your request rate").encode())
        elif fault == "expired":
            self._send(400, {}, _ERROR.format("ExpiredToken", "The provided token has expired").encode())
        else:
            self._pass_on(body, is_short=fault == "short")

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _answer  # noqa: N815 - names that the standard library looks for

    def _pass_on(self, body: bytes, *, is_short: bool) -> None:
        """Let the store do as it was asked; a short answer is one whose second half gets lost."""
        upstream = http.client.HTTPConnection(urlsplit(self.server.proxy.upstream).netloc, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
        upstream.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
        answer = upstream.getresponse()
        data = answer.read()
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        passed = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP}
        upstream.close()
        self.close_connection |= is_short
        self._send(answer.status, passed, data[: len(data) // 2] if is_short else data, length)

    def _send(self, status: int, headers: dict[str, str], body: bytes, length: str | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", length if length is not None else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass
