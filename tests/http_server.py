"""Servers of tests, in a thread of the test's own process."""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseServer


@contextmanager
def serving(server: BaseServer) -> Iterator[None]:
    """Serve requests for as long as the block runs, then close the server's socket."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class PlainFolder(SimpleHTTPRequestHandler):
    """Python's own file server: folders are pages of links, no ranges."""

    def log_message(self, *_: object) -> None:
        pass


class RangedFolder(PlainFolder):
    """The same, but answers ranges as most servers do."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            super().do_HEAD()
            return
        self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(path.stat().st_size))
        self.end_headers()

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        wanted = self.headers.get("Range", "").removeprefix("bytes=")
        if not path.is_file() or not wanted:
            super().do_GET()
            return
        data = path.read_bytes()
        first, last = (int(number) for number in wanted.split("-"))
        body = data[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class SlowStore(ThreadingHTTPServer):
    """Serves `files` on a port of its own, each after a while, so that no job ends before its test."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _SlowAnswer)
        self.files: dict[str, bytes] = {}
        """`/name` -> content."""

        self.latency_s = 0.0
        self.num_served = 0
        self._most_served = math.inf
        self._turn = threading.Condition()

    def url(self, name: str) -> str:
        """Return the URL of a file."""
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def hold_after(self, num: float) -> None:
        """Answer so many more requests, and the others only once this is called again: no job outruns its test."""
        with self._turn:
            self._most_served = self.num_served + num
            self._turn.notify_all()

    def take_turn(self) -> None:
        """Return when one more request may be answered."""
        with self._turn:
            self._turn.wait_for(lambda: self.num_served < self._most_served)
            self.num_served += 1

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: those who ask are killed in the middle."""


class _SlowAnswer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits for the receipt of its headers, which comes 40 ms later

    def do_GET(self) -> None:
        assert isinstance(self.server, SlowStore)
        time.sleep(self.server.latency_s)
        self.server.take_turn()
        data = self.server.files.get(self.path)
        self.send_response(404 if data is None else 200)
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        self.wfile.write(data or b"")

    def log_message(self, *args: object) -> None:
        pass
