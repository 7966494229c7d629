import datetime
import os
import pickle
import socket
import ssl
import struct
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from captioner.config import ImageConfig, InputConfig
from captioner.inputs import Fetcher
from captioner.inputs.readers import LocalReader
from captioner.schema import TRANSIENT_REASONS, Reject, RejectReason

SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate</Message></Error>"
ARCHIVED = b"<?xml version='1.0'?><Error><Code>InvalidObjectState</Code><Message>Restore it first</Message></Error>"
EXPIRED = b"<?xml version='1.0'?><Error><Code>ExpiredToken</Code><Message>The token has expired</Message></Error>"


class _Handler(BaseHTTPRequestHandler):
    """Misbehaves as the path says: /busy-2 is busy twice, /status-403 has that status, and so on."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        name = self.path.rpartition("/")[2].partition("?")[0]
        self.server.seen[name] += 1
        verb, _, number = name.partition("-")
        getattr(self, f"_{verb}", self._ok)(int(number or 0), self.server.seen[name])

    def _ok(self, number, count):
        self._send(200, f"body of {self.path}".encode())

    def _busy(self, number, count):
        if count <= number:
            self._send(503, SLOW_DOWN, {"Retry-After": "0"})
        else:
            self._ok(number, count)

    def _expired(self, number, count):
        self._send(400, EXPIRED)

    def _archived(self, number, count):
        self._send(403, ARCHIVED)

    def _status(self, number, count):
        self._send(number, b"no")

    def _reset(self, number, count):
        if count <= number:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
        else:
            self._ok(number, count)

    def _short(self, number, count):
        if count <= number:
            self._head(200, 1000)
            self.wfile.write(b"only this")
            self.close_connection = True
        else:
            self._ok(number, count)

    def _hang(self, number, count):
        self.server.released.wait(30)

    def _stall(self, number, count):
        self._head(200, 1000)
        self.wfile.write(b"a bit")
        self.server.released.wait(30)

    def _large(self, number, count):
        self._head(200, number)
        self._pour()

    def _endless(self, number, count):
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        self._pour()

    def _pour(self):
        self.close_connection = True
        try:
            while self.server.poured < 200 << 20:
                self.wfile.write(bytes(1 << 16))
                self.server.poured += 1 << 16
        except OSError:
            pass  # the reader has seen enough

    def _empty(self, number, count):
        self._send(200, b"")

    def _moved(self, number, count):
        self._send(302, b"", {"Location": f"http://127.0.0.3:{self.server.server_port}/ok"})

    def _noise(self, number, count):
        self.wfile.write(b"\0\1 no protocol at all\r\n\r\n")
        self.close_connection = True

    def _loop(self, number, count):
        self._send(302, b"", {"Location": "/loop"})

    def _send(self, status, body, headers=()):
        self._head(status, len(body), headers)
        self.wfile.write(body)

    def _head(self, status, length, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, *args):
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        pass  # resets are what this server is for


@pytest.fixture(scope="module")
def running():
    server = _Server(("127.0.0.1", 0), _Handler)
    server.released = threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def server(running, monkeypatch):
    monkeypatch.setattr("captioner.inputs.fetching.pause_s", lambda *_: 0.01)
    running.seen, running.poured = Counter(), 0
    running.url = f"http://127.0.0.1:{running.server_port}"
    return running


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    """The address of a server with a certificate that nobody vouches for."""
    folder = tmp_path_factory.mktemp("tls")
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "nobody")])
    now = datetime.datetime.now(datetime.UTC)
    built = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
    (folder / "cert.pem").write_bytes(built.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "key.pem").write_bytes(secret)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    server = _Server(("127.0.0.1", 0), _Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.seen, server.poured = Counter(), 0
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"https://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def _fetch(uris, input_path="/a/local/list.txt", access=InputConfig(), **image):  # noqa: B008
    return Fetcher(input_path, access, ImageConfig(**image)).fetch(uris)


def _reason(outcome):
    return outcome.reason if isinstance(outcome, Reject) else None


def test_outcomes_come_in_the_order_of_the_uris(server):
    uris = [f"{server.url}/{name}" for name in ["ok", "status-404", "busy-1", "ok"]] * 10
    outcomes = _fetch(uris, fetch_concurrency=4)
    assert [_reason(outcome) for outcome in outcomes] == [None, "missing", None, None] * 10
    assert outcomes[0] == b"body of /ok"


@pytest.mark.parametrize("name", ["busy-2", "reset-2", "short-2"])
def test_what_passes_is_tried_again(server, name):
    assert _fetch([f"{server.url}/{name}"]) == [f"body of /{name}".encode()]
    assert server.seen[name] == 3


@pytest.mark.parametrize("name", ["busy-99", "reset-99", "short-99", "status-500", "status-429"])
def test_what_does_not_pass_is_fetch_failed_after_every_retry(server, name):
    [outcome] = _fetch([f"{server.url}/{name}"], fetch_retries=3)
    assert outcome.reason == RejectReason.FETCH_FAILED
    assert outcome.detail.endswith("(tried 4 times)")
    assert server.seen[name] == (8 if name == "reset-99" else 4)  # aiohttp itself opens a dropped connection anew, once


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("status-404", "missing"),
        ("status-410", "missing"),
        ("status-401", "forbidden"),
        ("status-403", "forbidden"),
        ("status-451", "forbidden"),
        ("status-400", "fetch_failed"),
        ("loop", "fetch_failed"),
        ("empty", "empty"),
    ],
)
def test_what_is_final_is_not_tried_again(server, name, reason):
    [outcome] = _fetch([f"{server.url}/{name}"])
    assert outcome.reason == reason
    assert server.seen[name] == 1 or name == "loop"


@pytest.mark.parametrize("name", ["hang", "stall"])
def test_a_hung_object_costs_its_deadline_and_not_its_neighbours(server, name):
    uris = [f"{server.url}/{name}", *[f"{server.url}/ok"] * 20]
    outcomes = _fetch(uris, fetch_timeout_s=2)
    assert outcomes[0] == Reject(RejectReason.FETCH_FAILED, "not delivered within 2 s (no answer)")
    assert outcomes[1:] == [b"body of /ok"] * 20


def test_retries_end_at_the_deadline(server, monkeypatch):
    monkeypatch.setattr("captioner.inputs.fetching.pause_s", lambda *_: 30)
    [outcome] = _fetch([f"{server.url}/busy-99"], fetch_timeout_s=0.3)
    assert outcome.reason == RejectReason.FETCH_FAILED
    assert "not delivered within 0.3 s (HTTP 503" in outcome.detail


def test_an_image_that_is_too_large_is_refused_before_its_body_is_read(server):
    [outcome] = _fetch([f"{server.url}/large-{50 << 20}"], max_image_bytes=1 << 20)
    assert outcome == Reject(RejectReason.TOO_LARGE, "52,428,800 bytes; --max-image-bytes is 1,048,576")
    assert server.poured < 16 << 20  # what fits into the sockets' buffers


def test_a_body_of_untold_length_is_read_up_to_the_limit(server):
    [outcome] = _fetch([f"{server.url}/endless"], max_image_bytes=1 << 20)
    assert outcome == Reject(RejectReason.TOO_LARGE, "more than 1,048,576 bytes")
    assert server.poured < 32 << 20


def test_odd_names_in_web_addresses_reach_the_server_as_they_are(server):
    outcomes = _fetch([f"{server.url}/{name}" for name in ["a b.jpg", "a%20b.jpg", "ü.jpg?x=1&y=%2F", "a%23b.jpg"]])
    assert [outcome.decode().rpartition("/")[2] for outcome in outcomes][:2] == ["a%20b.jpg", "a%20b.jpg"]
    assert outcomes[2].startswith(b"body of /%C3%BC.jpg?x=1&y=")
    assert outcomes[3] == b"body of /a%23b.jpg"


def test_what_is_no_address_at_all_is_a_reject(server):
    uris = [
        "http://",
        "https://[::1",
        "http://127.0.0.1:1/x",
        "http://no.such.host.invalid/x",
        "no\0pe",
        "x" * 5000,
        "",
    ]
    outcomes = _fetch(uris, fetch_retries=0)
    assert [isinstance(outcome, Reject) for outcome in outcomes] == [True] * len(uris)
    assert [outcome.reason for outcome in outcomes[4:6]] == ["missing", "missing"]


NEVER = ["status-400", "status-405", "status-414", "http://no.such.host.invalid/x", "{tls}/ok"]


@pytest.mark.parametrize("never", NEVER)
def test_what_the_web_will_never_give_is_unreachable_once_some_server_gave_something(server, tls, never):
    uri = never.format(tls=tls) if "/" in never else f"{server.url}/{never}"
    fetcher = Fetcher("/a/local/list.txt", InputConfig(), ImageConfig(fetch_retries=3))
    assert _reason(fetcher.fetch([uri])[0]) == "fetch_failed"  # as it would be of a network that is down
    num_asked = server.seen[never]
    assert fetcher.fetch([f"{server.url}/ok"]) == [b"body of /ok"]
    assert _reason(fetcher.fetch([uri])[0]) == "unreachable"
    assert RejectReason.UNREACHABLE not in TRANSIENT_REASONS
    assert server.seen[never] == 2 * num_asked
    assert num_asked == never.startswith("status")  # there is no second try


@pytest.mark.parametrize(("name", "num_tries"), [("loop", None), ("status-206", 3), ("status-302", 1)])
def test_an_answer_that_is_not_the_object_may_be_another_one_tomorrow(server, name, num_tries):
    fetcher = Fetcher("/a/local/list.txt", InputConfig(), ImageConfig(fetch_retries=2))
    [_, outcome] = fetcher.fetch([f"{server.url}/ok", f"{server.url}/{name}"])
    assert outcome.reason == "fetch_failed"
    assert num_tries is None or server.seen[name] == num_tries
    [version] = fetcher.versions([f"{server.url}/{name}"])
    assert isinstance(version, Reject) or not version


def test_an_answer_that_is_no_http_is_asked_for_again(server):
    fetcher = Fetcher("/a/local/list.txt", InputConfig(), ImageConfig(fetch_retries=2))
    [_, outcome] = fetcher.fetch([f"{server.url}/ok", f"{server.url}/noise"])
    assert outcome.reason == "fetch_failed"
    assert server.seen["noise"] == 3


def test_a_request_that_s3_does_not_take_may_be_for_our_settings(server):
    _fetch([f"{server.url}/ok"])
    [outcome] = _fetch(["s3://bucket/status-400"], access=_s3(server))
    assert (outcome.reason, server.seen["status-400"]) == ("fetch_failed", 1)


# -- S3


def _s3(server, **options):
    login = {"key": "k", "secret": "very-secret", "endpoint_url": server.url}
    return InputConfig(storage_options={**login, "client_kwargs": {"region_name": "us-east-1"}, **options})


@pytest.mark.parametrize("name", ["busy-2", "reset-2", "short-2"])
def test_s3_is_tried_again_by_one_count_of_retries(server, name):
    [outcome] = _fetch([f"s3://bucket/{name}"], access=_s3(server))
    assert outcome == f"body of /bucket/{name}".encode()
    assert server.seen[name] == 3


@pytest.mark.parametrize(
    ("name", "reason", "num_tries"),
    [
        ("busy-99", "fetch_failed", 3),
        ("expired", "fetch_failed", 3),
        ("status-403", "forbidden", 1),
        ("status-404", "missing", 1),
        ("empty", "empty", 1),
    ],
)
def test_s3_failures_have_the_same_reasons(server, name, reason, num_tries):
    [outcome] = _fetch([f"s3://bucket/{name}"], access=_s3(server), fetch_retries=2)
    assert outcome.reason == reason
    assert server.seen[name] == num_tries
    assert "very-secret" not in outcome.detail


def test_an_archived_object_is_told_from_credentials_that_are_wrong(server):
    [outcome] = _fetch(["s3://bucket/archived"], access=_s3(server))
    assert (outcome.reason, outcome.detail.partition(":")[0]) == ("forbidden", "InvalidObjectState")


def test_s3_objects_that_hang_or_are_too_large_are_given_up(server):
    uris = ["s3://bucket/hang", f"s3://bucket/large-{50 << 20}", "s3://bucket/ok"]
    outcomes = _fetch(uris, access=_s3(server), fetch_timeout_s=1, max_image_bytes=1 << 20)
    assert [_reason(outcome) for outcome in outcomes] == ["fetch_failed", "too_large", None]
    assert server.poured < 16 << 20


# -- what a list may point to


@pytest.mark.parametrize(
    "uri",
    [
        "/etc/passwd",
        "file:///etc/passwd",
        "local:///etc/passwd",
        "file+percent:///etc/passwd",
        "http://127.0.0.1/x",
        "http://0.0.0.0/x",
        "http://[::1]/x",
        "http://[::ffff:127.0.0.1]/x",
        "http://169.254.169.254/latest/meta-data",
        "http://localhost/x",
        "http://LOCALHOST./x",
        "http://user@localhost:80/x",
        "sftp://host/x",
        "zip://x",
    ],
)
def test_a_remote_list_may_not_point_inside(uri):
    [outcome] = _fetch([uri], input_path="s3://bucket/list.txt")
    assert outcome.reason == RejectReason.UNSAFE_URI
    assert "--allow-local-uris" in outcome.detail


@pytest.mark.parametrize("uri", ["http://127.1/x", "http://2130706433/x", "http://0x7f.1/x"])
def test_an_address_in_disguise_is_a_reject(server, uri):
    [outcome] = _fetch([uri.replace("/x", f":{server.server_port}/x")], input_path="s3://bucket/list.txt")
    assert isinstance(outcome, Reject)
    assert not server.seen


def test_a_redirect_may_not_lead_inside_either(server, monkeypatch):
    """The first address is let through as if it were public; the one it leads to is not."""
    monkeypatch.setattr("captioner.storage.hosts.is_inner", lambda host: host == "127.0.0.3")
    monkeypatch.setattr("captioner.storage.hosts.is_own", lambda address: False)
    [outcome] = _fetch([f"{server.url}/moved"], input_path="s3://bucket/list.txt")
    assert outcome.reason == RejectReason.UNSAFE_URI, outcome
    assert server.seen["moved"] == 1


def test_a_list_may_point_to_its_own_server_and_inside_where_that_is_allowed(server, tmp_path):
    uri = f"{server.url}/ok"
    (tmp_path / "x").write_bytes(b"local")
    assert _fetch([uri], input_path=f"{server.url}/list.txt") == [b"body of /ok"]
    allowed = InputConfig(allow_local_uris=True)
    assert _fetch([uri, f"{tmp_path}/x"], input_path="s3://bucket/list.txt", access=allowed) == [
        b"body of /ok",
        b"local",
    ]
    assert _fetch([uri, f"{tmp_path}/x"], input_path="/lists/list.txt") == [b"body of /ok", b"local"]


def test_s3_options_are_not_sent_to_other_stores(server):
    fetcher = Fetcher("s3://bucket/x", _s3(server), ImageConfig())
    assert fetcher._options("s3://other/x")["key"] == "k"
    assert fetcher._options("https://h/x") == fetcher._options("gs://b/x") == {}


@pytest.mark.parametrize(
    ("input_path", "uri", "other"),
    [
        ("hdfs://nn1/list.txt", "hdfs://nn1/a.jpg", "hdfs://nn2/a.jpg"),
        ("abfs://c@one.dfs.core.windows.net/l.txt", "abfs://d@one.dfs.core.windows.net/a", "abfs://c@two.dfs/a"),
        ("https://one.example/list.txt", "https://one.example:443/a", "https://one.example:8443/a"),
    ],
)
def test_each_server_of_a_kind_of_store_has_its_own_reader_and_only_the_inputs_own_its_credentials(
    monkeypatch, input_path, uri, other
):
    opened = []
    monkeypatch.setattr(Fetcher, "_open_reader", lambda self, uri, scheme: opened.append(uri) or object())
    options = {"headers": {"Authorization": "hush"}}
    fetcher = Fetcher(input_path, InputConfig(storage_options=options), ImageConfig())
    assert fetcher._reader(uri) is fetcher._reader(uri) is not fetcher._reader(other)
    assert opened == [uri, other]
    assert (fetcher._options(uri), fetcher._options(other)) == (options, {})


def test_a_mount_that_hangs_holds_up_no_web_server(server, monkeypatch, tmp_path):
    hanging, asked = threading.Event(), []

    def is_away(folder):
        asked.append(folder)
        hanging.wait(30)
        return True

    monkeypatch.setattr("captioner.inputs.fetching.is_folder_away", is_away)
    fetcher = Fetcher("/list.txt", InputConfig(), ImageConfig(fetch_concurrency=32, fetch_timeout_s=5))
    gone = [f"{tmp_path}/gone/{number}.jpg" for number in range(20)]
    stream = fetcher._stream(list(enumerate([*gone, f"{server.url}/ok"])))
    assert next(stream) == [(20, b"body of /ok")]
    hanging.set()
    assert {outcome.reason for batch in stream for _, outcome in batch} == {"fetch_failed"}
    assert asked == [f"{tmp_path}/gone"], "once a folder"


# -- local files


def test_local_files_that_are_no_files_are_rejects(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "secret").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    names = ["", "pipe", "gone", "link", "secret", "secret/x"]
    outcomes = _fetch([f"{tmp_path}/{name}" for name in names] + ["/dev/zero"])
    assert [_reason(outcome) for outcome in outcomes] == ["missing"] * 4 + ["empty"] + ["missing"] * 2


def test_files_are_read_several_at_a_time_and_alone_only_from_one_that_cannot_be_read(tmp_path, monkeypatch):
    names = [f"{tmp_path}/{number}" for number in range(7)]
    for number, name in enumerate(names):
        if number != 5:
            Path(name).write_bytes(b"%d" % number * 600_000)  # two of them are a chunk
    alone, read = [], LocalReader.read

    def counting(self, uri, max_bytes):
        alone.append(uri)
        return read(self, uri, max_bytes)

    monkeypatch.setattr(LocalReader, "read", counting)
    outcomes = _fetch(names, fetch_concurrency=1)
    assert [bytes(found[:1]) for found in outcomes if not isinstance(found, Reject)] == [
        b"0",
        b"1",
        b"2",
        b"3",
        b"4",
        b"6",
    ]
    assert _reason(outcomes[5]) == "missing"
    assert set(alone) == {names[5], names[6]}


@pytest.mark.parametrize("pattern", ["", "*/*.jpg"])
@pytest.mark.parametrize("how", ["gone", "empty"])
def test_files_that_are_missing_with_the_whole_input_are_tried_again_later(tmp_path, pattern, how):
    root = tmp_path / "disk"
    (root / "a").mkdir(parents=True)
    (root / "a/1.jpg").write_bytes(b"one")
    fetcher = Fetcher(str(root / pattern), InputConfig(), ImageConfig())
    files = [str(root / "a/1.jpg"), str(root / "a/2.jpg")]
    assert [getattr(found, "reason", found) for found in fetcher.fetch(files)] == [b"one", "missing"]
    (root / "a").rename(tmp_path / "elsewhere")
    if how == "gone":
        root.rmdir()
    assert [found.reason for found in fetcher.fetch(files)] == ["fetch_failed", "fetch_failed"]


@pytest.mark.parametrize("how", ["gone", "empty"])
def test_images_of_a_list_whose_disk_is_not_mounted_are_tried_again_later(tmp_path, how):
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "1.jpg").write_bytes(b"one")
    fetcher = Fetcher(str(tmp_path / "list.txt"), InputConfig(), ImageConfig())
    files = [str(disk / "1.jpg"), str(disk / "2.jpg")]
    assert [getattr(found, "reason", found) for found in fetcher.fetch(files)] == [b"one", "missing"]
    (disk / "1.jpg").unlink()
    if how == "gone":
        disk.rmdir()
    assert [found.reason for found in fetcher.fetch(files)] == ["fetch_failed", "fetch_failed"]


def test_a_local_file_that_is_too_large_is_a_reject(tmp_path):
    (tmp_path / "x").write_bytes(b"x" * 11)
    assert _reason(_fetch([f"{tmp_path}/x"], max_image_bytes=10)[0]) == "too_large"
    assert _fetch([f"{tmp_path}/x"], max_image_bytes=11) == [b"x" * 11]


def test_a_store_whose_package_is_missing_is_a_reject_with_the_remedy():
    [outcome] = _fetch(["gs://bucket/x"])
    assert outcome.reason == RejectReason.FETCH_FAILED
    assert "pip install '.[gcs]'" in outcome.detail


def test_a_fetcher_can_be_sent_to_another_process_and_shared_by_threads(tmp_path):
    for number in range(50):
        (tmp_path / str(number)).write_text(f"{number}")
    fetcher = pickle.loads(pickle.dumps(Fetcher(str(tmp_path), InputConfig(), ImageConfig(fetch_concurrency=3))))
    uris = [f"{tmp_path}/{number}" for number in range(50)]
    outcomes = {}
    threads = [threading.Thread(target=lambda n=n: outcomes.update({n: fetcher.fetch(uris)})) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == {n: [str(number).encode() for number in range(50)] for n in range(4)}
