"""One way to any store: list it page by page, read from it steadily, write to it whole or not at all.

    store = open_store("s3://bucket/photos", storage_options)
    for page in store.pages("s3://bucket/photos/"): ...
    store.write_atomic("s3://bucket/table/part-0.parquet", data)

Every method takes full URLs (see `urls`). A Store can be pickled and shared by threads; each process opens its own
connections. Credentials and endpoint come from `storage_options` or the store's usual environment variables. Knows
nothing of images, units or tables.
"""

import contextlib
import ctypes
import functools
import importlib.util
import io
import itertools
import os
import random
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import aiohttp
import fsspec

from captioner import __version__
from captioner.errors import CaptionerError, InputError
from captioner.rows import RejectReason
from captioner.sources import urls
from captioner.sources.faults import StoreError, diagnose, is_taken
from captioner.sources.hosts import socket_guard

__all__ = ["PAGE_SIZE", "Entry", "S3Store", "Store", "http_client", "open_store", "pause_s"]

T = TypeVar("T")

PAGE_SIZE = 1000  # entries of one listing page, as S3 has it
_READ_RETRIES = 4
_CONNECT_TIMEOUT_S = 10.0
_READ_TIMEOUT_S = 20.0  # between two pieces of a body
_S3_CONFIG = {
    "retries": {"max_attempts": 0},
    "connect_timeout": _CONNECT_TIMEOUT_S,
    "read_timeout": _READ_TIMEOUT_S,
}
_BUFFER_BYTES = {"file": 1 << 18}
_REMOTE_BUFFER_BYTES = 4 << 20
_PACKAGES = {"gs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "s3": "s3fs", "hf": "huggingface_hub"}
_EXTRAS = {"gcsfs": "captioner[gcs]", "adlfs": "captioner[azure]"}
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of fcntl.h and stdio.h
_SCHEMES_WITHOUT_CACHE_OPTION = frozenset({"http", "https", "memory", "file"})


class Entry(NamedTuple):
    """One thing in a store. `size_bytes` is None where the store does not tell."""

    url: str
    size_bytes: int | None
    is_folder: bool = False


def open_store(url: str, storage_options: Mapping[str, Any] | None = None) -> "Store":
    """Return the store that `url` lies in. Connects to nothing yet; raises InputError when its package is missing."""
    scheme = urls.scheme(url)
    if urls.holds_login(url) and scheme not in ("http", "https", "file"):
        raise InputError(
            f"{urls.redact(url)} holds credentials; pass them with --storage-options, or by the environment"
        )
    _check_scheme(scheme)
    kinds = {"file": LocalStore, "s3": S3Store, "http": HttpStore, "https": HttpStore}
    return kinds.get(scheme, Store)(url, storage_options or {})


def pause_s(attempt: int, retry_after_s: float = 0.0) -> float:
    """Return how long to wait before another attempt: 0.25 s doubling up to 8 s, half to one and a half of it."""
    return max(retry_after_s, min(0.25 * 2.0**attempt, 8.0) * random.uniform(0.5, 1.5))


async def http_client(
    *, loop: Any, num_connections: int = 100, socket_factory: Callable[..., Any] | None = None, **client_kwargs: Any
) -> aiohttp.ClientSession:
    """Return a session that gives up a server which is silent for long, however long the whole answer takes."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=_READ_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=num_connections, socket_factory=socket_factory)
    headers = {"User-Agent": f"captioner/{__version__}", **client_kwargs.pop("headers", {})}
    return aiohttp.ClientSession(
        loop=loop, connector=connector, headers=headers, **{"timeout": timeout, **client_kwargs}
    )


class Store:
    """A store reached through fsspec."""

    _num_retries = _READ_RETRIES

    def __init__(self, url: str, storage_options: Mapping[str, Any]) -> None:
        self.scheme = urls.scheme(url)
        self._url = url
        self._options = dict(storage_options)
        self._opened: tuple[int, Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._url, self._options)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({urls.redact(self._url)!r})"

    @property
    def fs(self) -> Any:
        """The fsspec filesystem of this process."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), self._connect()
        return self._opened[1]

    def _connect(self) -> Any:
        kind = fsspec.get_filesystem_class(self.scheme)
        options = {**self._url_options(), **self._options}
        if self.scheme not in _SCHEMES_WITHOUT_CACHE_OPTION:
            options.setdefault("use_listings_cache", False)  # a cached listing is stale, and holds all names
        return kind(**options)

    def _url_options(self) -> dict[str, Any]:
        """Return what the URL says beside the path: a host, an account."""
        return dict(fsspec.get_filesystem_class(self.scheme)._get_kwargs_from_urls(self._url))

    def path(self, url: str) -> str:
        """Return what the filesystem calls `url`."""
        return str(self.fs._strip_protocol(url))

    def url(self, path: str) -> str:
        """Return the URL of a path as the filesystem gives it."""
        return path if "://" in path else f"{self.scheme}://{path.lstrip('/')}"

    def info(self, url: str) -> Entry | None:
        """Return what stands at `url`, a folder with the URL to list it by; None for nothing. Raises StoreError."""
        found = self._or_none(lambda: self.fs.info(self.path(url)))
        return found and _file_or_folder(url, found.get("size"), is_folder=found["type"] == "directory")

    def pages(self, prefix: str) -> Iterator[list[Entry]]:
        """Yield every file whose URL starts with `prefix`, in a fixed order, at most PAGE_SIZE at a time.

        Never holds more than a page and one folder's names. Raises StoreError.
        """
        page: list[Entry] = []
        for entry in self._walk(prefix):
            page.append(entry)
            if len(page) == PAGE_SIZE:
                yield page
                page = []
        if page:
            yield page

    def _walk(self, prefix: str) -> Iterator[Entry]:
        folder = prefix if prefix.endswith("/") else urls.parent(prefix)
        stem = prefix.removeprefix(folder).lstrip("/")
        known = self._or_none(lambda: self._children(folder)) or []
        first = [entry for entry in known if urls.name(entry.url).startswith(stem)]
        stack = [(iter(first), self._identity(folder))] if first else []
        while stack:
            entry = next(stack[-1][0], None)
            if entry is None:
                stack.pop()
            elif not entry.is_folder:
                yield entry
            elif (identity := self._identity(entry.url)) not in {known for _, known in stack}:
                stack.append((iter(self._children(entry.url)), identity))

    def _identity(self, folder: str) -> object:
        return folder.rstrip("/")

    def _children(self, folder: str) -> list[Entry]:
        """Return a folder's entries in the order of a flat listing: a folder sorts as its name and a slash."""
        own = self.path(folder).rstrip("/")
        found = self._steady(lambda: self.fs.ls(self.path(folder), detail=True))
        entries = [
            Entry(self.url(info["name"]), info.get("size"), is_folder=info["type"] == "directory")
            for info in found
            if info["name"].rstrip("/") != own
        ]
        return _in_order(entries)

    def open(self, url: str) -> BinaryIO:
        """Return a seekable, buffered reader that survives throttling, resets and timeouts. Raises StoreError."""
        return io.BufferedReader(self.open_unbuffered(url), _BUFFER_BYTES.get(self.scheme, _REMOTE_BUFFER_BYTES))

    def open_unbuffered(self, url: str) -> "SteadyFile":
        """Return such a reader for callers that ask for large pieces themselves."""
        return SteadyFile(lambda: self._reader(url), self._steady)

    def _reader(self, url: str) -> Any:
        return self.fs.open(self.path(url), "rb", cache_type="none")

    def read_bytes(self, url: str) -> bytes:
        """Return everything that stands at `url`. Raises StoreError."""
        return bytes(self._steady(lambda: self.fs.cat_file(self.path(url))))

    def read_range(self, url: str, start: int, stop: int) -> bytes:
        """Return bytes `start` to `stop` of what stands at `url`. Raises StoreError."""
        return bytes(self._steady(lambda: self._exactly(url, start, stop)))

    def _exactly(self, url: str, start: int, stop: int) -> bytes:
        data: bytes = self.fs.cat_file(self.path(url), start=start, end=stop)
        if len(data) != stop - start:
            raise EOFError(f"{len(data)} of {stop - start} bytes at {start}")
        return data

    def write_atomic(self, url: str, data: bytes, check: Callable[[], None] = lambda: None) -> None:
        """Make `url` hold exactly `data`, or leave it as it was. Raises StoreError.

        `check` is called as late as can be before each try, and prevents it by raising a CaptionerError.
        Object stores: one upload that is only visible when complete; never `open(.., "wb")`, whose files some stores
        commit on close even after an exception.
        """

        def write() -> None:
            check()
            self.fs.pipe_file(self.path(url), data)

        self._steady(write)

    def create(self, url: str, data: bytes) -> bool:
        """Make `url` hold `data` unless something stands there; return whether it now holds it. Raises StoreError.

        Of several that create one URL at the same time one succeeds: on S3 by `If-None-Match: *`, on other stores as
        far as their fsspec package has an exclusive write.
        """
        is_ours = self._steady(lambda: self._create_once(url, data))
        # An earlier try may have arrived though its answer was lost.
        return is_ours or self._or_none(lambda: self.read_bytes(url)) == data

    def _create_once(self, url: str, data: bytes) -> bool:
        try:
            self.fs.pipe_file(self.path(url), data, mode="create")
        except Exception as error:  # each fsspec store raises its own kinds
            if is_taken(error):
                return False
            raise
        return True

    def move(self, url: str, target: str) -> None:
        """Make `target` hold what stands at `url`, then `url` nothing. Raises StoreError."""
        self._steady(lambda: self.fs.cp_file(self.path(url), self.path(target)))
        self.remove(url)

    def exchange(self, folder: str, other: str) -> bool:
        """Make each of two folders hold what the other held, at one moment; return False where that is not possible."""
        del folder, other
        return False

    def remove(self, url: str) -> None:
        """Make `url` hold nothing; it may be nothing already. Raises StoreError."""
        self._or_none(lambda: self.fs.rm_file(self.path(url)))

    def entries(self, folder: str) -> list[Entry]:
        """Return what stands in a folder, in order; nothing where there is no such folder. Raises StoreError."""
        return self._or_none(lambda: self._children(folder)) or []

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of a folder's files; none where there is no such folder. Raises StoreError."""
        return [urls.name(entry.url) for entry in self.entries(folder) if not entry.is_folder]

    def _or_none(self, access: Callable[[], T]) -> T | None:
        try:
            return self._steady(access)
        except StoreError as error:
            if error.fault.reason == RejectReason.MISSING:
                return None
            raise

    def _steady(self, access: Callable[[], T]) -> T:
        """Return what `access` returns; tries again, with growing pauses, while its failure may pass."""
        for attempt in itertools.count():
            try:
                return access()
            except CaptionerError:
                raise
            except Exception as error:  # each fsspec store raises its own kinds; diagnose() keeps type and text
                fault = diagnose(error)
                if attempt == self._num_retries or not fault.is_transient:
                    raise StoreError(fault) from error
            time.sleep(pause_s(attempt, min(fault.retry_after_s, 30.0)))
        raise AssertionError("unreachable")


class SteadyFile(io.RawIOBase):
    """A reader that, when the store drops it, opens the file anew and goes on where it was."""

    def __init__(self, reopen: Callable[[], Any], steady: Callable[[Callable[[], Any]], Any]) -> None:
        super().__init__()
        self._reopen = reopen
        self._steady = steady
        self._position = 0
        self._file = steady(reopen)
        self.size_bytes: int = self._size()

    def _size(self) -> int:
        size = self._file.seek(0, io.SEEK_END)
        self._file.seek(0)
        return int(size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size_bytes}[whence]
        self._position = min(max(0, base + offset), self.size_bytes)  # so that who skips over the end learns of it
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self.size_bytes - self._position)
        wanted = left if size is None or size < 0 else min(size, left)
        data = self._steady(lambda: self._read_once(wanted)) if wanted else b""
        self._position += len(data)
        return bytes(data)

    def _read_once(self, wanted: int) -> bytes:
        if self._file is None:
            self._file = self._reopen()
        file, self._file = self._file, None  # stays None, so is opened anew, when the next lines raise
        file.seek(self._position)
        data = file.read(wanted)
        if len(data) < wanted:
            raise EOFError(f"{len(data)} of {wanted} bytes at {self._position}")
        self._file = file
        return bytes(data)

    def close(self) -> None:
        if not self.closed and self._file is not None:
            self._file.close()
        super().close()


class S3Store(Store):
    """S3 and whatever speaks its protocol: a bucket is listed flat, by the pages of the service."""

    _num_retries = 7  # 24 s or so: throttling passes with patience

    def __init__(self, url: str, storage_options: Mapping[str, Any]) -> None:
        given = storage_options.get("config_kwargs") or {}
        if not isinstance(given, Mapping):
            raise InputError(f"config_kwargs of --storage-options is a {type(given).__name__}; expected an object")
        config_kwargs = {**_S3_CONFIG, **given}
        super().__init__(url, {**storage_options, "config_kwargs": config_kwargs})

    def _connect(self) -> Any:
        fs = super()._connect()
        fs.retries = 1  # the tries are counted here; botocore's times s3fs's times ours were 125, in 200 s a write
        return fs

    def _url_options(self) -> dict[str, Any]:
        return {}  # s3fs would find versions in keys with `?versionId=`

    def info(self, url: str) -> Entry | None:
        """As Store.info; a bare prefix of keys counts as a folder."""
        found = None if url.endswith("/") else super().info(url)
        if found is not None and (found.is_folder or found.size_bytes):
            return found
        folder = url.rstrip("/") + "/"
        if any(self.pages(folder)):
            return Entry(folder, None, is_folder=True)
        return found or (Entry(url, None, is_folder=True) if any(self.pages(url)) else None)

    def bucket_and_key(self, url: str) -> tuple[str, str]:
        """Return the bucket and the key, literally: s3fs would read `?versionId=` in a key as a version."""
        path = url.removeprefix("s3://")
        if path.startswith("arn:"):
            bucket, key, _ = self.fs.split_path(url)
        else:
            bucket, _, key = path.partition("/")
        return bucket, key

    def pages(self, prefix: str) -> Iterator[list[Entry]]:
        """As Store.pages, but holds one page only; in the service's order, that of the keys' bytes."""
        for page, bucket in self._pages(prefix):
            yield [Entry(f"s3://{bucket}/{item['Key']}", item["Size"]) for item in page]

    def stamped_pages(self, prefix: str) -> Iterator[list[tuple[str, str, int]]]:
        """Yield URL, ETag and size in bytes of every object, page by page. Raises StoreError."""
        for page, bucket in self._pages(prefix):
            yield [(f"s3://{bucket}/{item['Key']}", item["ETag"], item["Size"]) for item in page]

    def _pages(self, prefix: str) -> Iterator[tuple[list[dict[str, Any]], str]]:
        bucket, key = self.bucket_and_key(prefix)
        continued: dict[str, str] = {}
        while True:
            page = self._page(bucket, key, continued)
            yield page.get("Contents", []), bucket
            if not page.get("IsTruncated"):
                return
            continued = {"ContinuationToken": page["NextContinuationToken"]}

    def _page(self, bucket: str, key: str, continued: dict[str, str]) -> dict[str, Any]:
        return dict(
            self._steady(
                lambda: self.fs.call_s3(
                    "list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=PAGE_SIZE, **self.fs.req_kw, **continued
                )
            )
        )


class HttpStore(Store):
    """A web server: folders are pages of links."""

    def _url_options(self) -> dict[str, Any]:
        """Return what makes a session that no redirect leads inside, unless this server is there itself."""
        return {"get_client": functools.partial(http_client, socket_factory=socket_guard(self._url))}

    def url(self, path: str) -> str:
        """A path is a URL here."""
        return path

    def info(self, url: str) -> Entry | None:
        """As Store.info; a page of HTML counts as a folder."""
        found = self._or_none(lambda: self.fs.info(url))
        is_folder = url.endswith("/") or (found or {}).get("mimetype") == "text/html"
        return found and _file_or_folder(url, found.get("size"), is_folder=is_folder)

    def _children(self, folder: str) -> list[Entry]:
        root = folder.rstrip("/") + "/"
        found = self._steady(lambda: self.fs.ls(root, detail=True))
        below = {info["name"] for info in found if info["name"].startswith(root)}
        plain = (link for link in below if link != root and not {"?", "#"} & set(link.removeprefix(root)[:1]))
        return _in_order([Entry(link, None, is_folder=link.endswith("/")) for link in plain])

    def _reader(self, url: str) -> Any:
        """Return a reader; a server that cannot give ranges is read to a temporary file first."""
        info = self.fs.info(url)
        if info.get("partial") and info.get("size") is not None:
            return self.fs.open(url, "rb", cache_type="none")
        spool = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
        self.fs.get_file(url, spool)
        spool.seek(0)
        return spool


class LocalStore(Store):
    """The local file system, without fsspec between."""

    def path(self, url: str) -> str:
        """Return the plain path of `url`."""
        return urls.local_path(url)

    def info(self, url: str) -> Entry | None:
        """As Store.info."""
        found = self._or_none(Path(self.path(url)).stat)
        return found and _file_or_folder(url, found.st_size, is_folder=stat.S_ISDIR(found.st_mode))

    def _identity(self, folder: str) -> object:
        found = self._steady(Path(self.path(folder)).stat)
        return found.st_dev, found.st_ino  # a link to a folder above would never end

    def _children(self, folder: str) -> list[Entry]:
        return self._steady(lambda: self._scan(self.path(folder)))

    @staticmethod
    def _scan(folder: str) -> list[Entry]:
        with os.scandir(folder) as found:
            return _in_order([_local_entry(entry) for entry in found])

    def _reader(self, url: str) -> Any:
        return Path(self.path(url)).open("rb", buffering=0)

    def read_bytes(self, url: str) -> bytes:
        """As Store.read_bytes."""
        return self._steady(Path(self.path(url)).read_bytes)

    def write_atomic(self, url: str, data: bytes, check: Callable[[], None] = lambda: None) -> None:
        """As Store.write_atomic: a hidden file in the same folder, flushed to the disk, then renamed."""
        target = Path(self.path(url))
        temporary = target.with_name(f".{target.name[:100]}.{uuid.uuid4().hex}.tmp")
        try:
            _write_through(temporary, data)
            check()
            temporary.replace(target)
        except OSError as error:
            raise StoreError(diagnose(error)) from error
        finally:
            with contextlib.suppress(OSError):  # where the folder is a file, say, there is nothing to remove
                temporary.unlink()

    def _create_once(self, url: str, data: bytes) -> bool:
        """As Store.create: a whole file under a hidden name, then linked, which fails where the name is taken."""
        target = Path(self.path(url))
        temporary = target.with_name(f".{target.name[:100]}.{uuid.uuid4().hex}.tmp")
        try:
            _write_through(temporary, data)
            target.hardlink_to(temporary)
        except FileExistsError:
            return False
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        return True

    def move(self, url: str, target: str) -> None:
        """As Store.move; also of folders."""
        path = Path(self.path(target))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._steady(lambda: Path(self.path(url)).rename(path))

    def exchange(self, folder: str, other: str) -> bool:
        """As Store.exchange, by the renameat2 of Linux."""
        rename = getattr(ctypes.CDLL(None), "renameat2", None)
        first, second = (os.fsencode(self.path(url)) for url in (folder, other))
        return rename is not None and rename(_AT_FDCWD, first, _AT_FDCWD, second, _RENAME_EXCHANGE) == 0

    def remove(self, url: str) -> None:
        """As Store.remove."""
        Path(self.path(url)).unlink(missing_ok=True)


def _write_through(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _local_entry(entry: os.DirEntry[str]) -> Entry:
    url = urls.local_url(entry.path)
    try:
        return Entry(url, None, is_folder=True) if entry.is_dir() else Entry(url, entry.stat().st_size)
    except OSError:  # a broken link, a ring of links, or gone since: fetching it will say so
        return Entry(url, None)


def _file_or_folder(url: str, size_bytes: int | None, *, is_folder: bool) -> Entry:
    return Entry(url.rstrip("/") + "/", None, is_folder=True) if is_folder else Entry(url, size_bytes)


def _in_order(entries: list[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: entry.url.rstrip("/") + "/" if entry.is_folder else entry.url)


def _check_scheme(scheme: str) -> None:
    package = _PACKAGES.get(scheme)
    remedy = f"pip install '{_EXTRAS.get(package or '', package)}'"
    if package and importlib.util.find_spec(package) is None:
        raise InputError(f"{scheme}:// needs the package {package}: {remedy}")
    try:
        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"{scheme}:// cannot be opened: {error}; expected a local path or one of s3, gs, az, http, https"
        ) from error
