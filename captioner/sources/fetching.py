"""Bytes of many images at once, from any store: each URI gives its bytes or a typed reason, always in time.

    fetcher = Fetcher(config.input_path, config.input, config.image)
    for outcome in fetcher.fetch(uris): ...         # bytes | Reject, in the order of the URIs
    for outcome in fetcher.fetch_rows(table): ...   # the same for rows as `read_unit` gives them
    for outcome in fetcher.stamps(uris): ...        # str | Reject: what the store says of an object, without its bytes

Knows retries, deadlines, the size guard and which URIs a list may point to; does not know what an image is.
"""

import asyncio
import functools
import os
import stat
from collections.abc import Awaitable, Callable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from typing import Any, TypeVar

import fsspec.asyn
import pyarrow as pa

from captioner.config import ImageConfig, InputConfig
from captioner.errors import InputError
from captioner.rows import Reject, RejectReason
from captioner.sources import hosts, urls
from captioner.sources.arrivals import Arrival, Arrivals
from captioner.sources.blocks import too_large
from captioner.sources.faults import StoreError, diagnose
from captioner.sources.store import S3Store, Store, http_client, open_store, pause_s

__all__ = ["Fetcher"]

T = TypeVar("T")
Access = Callable[[str], Awaitable[T | Reject]]

_CHUNK_BYTES = 1 << 20
_STAMPS_AT_ONCE = 10_000
_LISTED_FROM = 100  # objects of a folder from which on its listing is tried
_ASKED_PER_PAGE = 10  # single questions that cost as much as a page of a listing
_NO_FILE = "not a file but a folder, a device or a pipe"
_NO_HEAD = (403, 405, 501)  # what servers answer that give the object but not what they know of it
_CHANGING = ("ETag", "etag", "md5Hash", "crc32c", "content_md5", "mtime", "LastModified", "last_modified", "created")
_HELD_BYTES = 64 << 20  # fetched, and not yet decoded
_ROWS_AT_ONCE = 64
_SCHEMES_OF_HOSTS = frozenset({"http", "https", "hdfs"})
_SECRETS = frozenset({"headers", "auth", "cookies", "cookie_jar"})
_LIST_SCHEMES = frozenset({"s3", "gs", "az", "abfs", "abfss", "http", "https", "hf", "oss", "oci", "hdfs", "memory"})


class Fetcher:
    """Fetches images the way one job is configured to; can be pickled, and shared by threads."""

    def __init__(self, input_path: str, access: InputConfig, image: ImageConfig) -> None:
        self._input = urls.absolute(input_path)
        self._access = access
        self._image = image
        self._connect()

    def _connect(self) -> None:
        self._stores: dict[str, _Reader] = {}
        self._threads = ThreadPoolExecutor(self._image.fetch_concurrency, "fetch")
        self._slots = asyncio.Semaphore(self._image.fetch_concurrency)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._input, self._access, self._image)

    def fetch(self, uris: Sequence[str]) -> list[bytes | Reject]:
        """Return the bytes behind each URI, or why there are none. Never raises for a URI or its store."""
        found: dict[int, bytes | Reject] = {}
        for arrivals in self._stream(list(enumerate(uris))):
            found.update(arrivals)
        return [found[place] for place in range(len(uris))]

    def stamps(self, uris: Sequence[str]) -> list[str | Reject]:
        """Return what each store says of the object: another text once the object is another. Never raises.

        Empty where the store does not say; a reject where it says that there is no such object, or nothing at all.
        """
        known = self._listed_stamps(uris)
        asked = [uri for uri in uris if uri not in known]
        for start in range(0, len(asked), _STAMPS_AT_ONCE):
            these = asked[start : start + _STAMPS_AT_ONCE]
            found = asyncio.run_coroutine_threadsafe(self._stamp_all(these), fsspec.asyn.get_loop()).result()
            known |= zip(these, found, strict=True)
        return [known[uri] for uri in uris]

    def _listed_stamps(self, uris: Sequence[str]) -> dict[str, str | Reject]:
        """Return the stamps of objects on S3 that lie beside many others: a thousand come in one answer."""
        folders: dict[str, set[str]] = {}
        for uri in uris:
            if urls.scheme(uri) == "s3":
                folders.setdefault(urls.parent(uri), set()).add(uri)
        known: dict[str, str | Reject] = {}
        for folder, wanted in folders.items():
            reader = self._reader(folder)
            if len(wanted) >= _LISTED_FROM and isinstance(reader, _S3Reader):
                known |= reader.stamps_in(folder, wanted)
        return known

    def fetch_rows(self, rows: pa.Table) -> list[bytes | Reject]:
        """Return the bytes of each row of `rows.source_schema`, fetched if it has only a URI, or why there are none."""
        found: dict[int, bytes | Reject] = {}
        for arrivals in self.stream_rows(rows):
            found.update(arrivals)
        return [found[place] for place in range(rows.num_rows)]

    def stream_rows(self, rows: pa.Table) -> Iterator[list[Arrival]]:
        """Yield the same with the number of the row, a few at a time as they arrive.

        What is fetched and not yet asked for stays below some 100 MB, and the images that are under way.
        """
        uris = rows.column("uri").to_pylist()
        here = [place for place, uri in enumerate(uris) if uri is None or rows["reason"][place].is_valid]
        for start in range(0, len(here), _ROWS_AT_ONCE):
            yield [(place, _present(rows, place)) for place in here[start : start + _ROWS_AT_ONCE]]
        absent = set(range(len(uris))).difference(here)
        yield from self._stream([(place, uris[place]) for place in sorted(absent)])

    async def _stamp_all(self, uris: Sequence[str]) -> list[str | Reject]:
        return list(await asyncio.gather(*(self._ask(uri, lambda uri: self._reader(uri).stamp(uri)) for uri in uris)))

    def _stream(self, wanted: Sequence[tuple[int, str]]) -> Iterator[list[Arrival]]:
        if not wanted:
            return
        loop = fsspec.asyn.get_loop()
        arrivals = Arrivals(loop, _HELD_BYTES)
        future = asyncio.run_coroutine_threadsafe(self._fetch_all(wanted, arrivals), loop)
        future.add_done_callback(lambda _: arrivals.end())
        try:
            yield from arrivals
        finally:
            future.cancel()
        future.result()

    async def _fetch_all(self, wanted: Sequence[tuple[int, str]], arrivals: Arrivals) -> None:
        local = [(place, uri) for place, uri in wanted if urls.scheme(uri) == "file" and not self._objection(uri)]
        places = {place for place, _ in local}
        step = -(-len(local) // self._image.fetch_concurrency) or 1
        await asyncio.gather(
            *(self._fetch_files(local[start : start + step], arrivals) for start in range(0, len(local), step)),
            *(self._fetch_one(place, uri, arrivals) for place, uri in wanted if place not in places),
        )

    async def _fetch_one(self, place: int, uri: str, arrivals: Arrivals) -> None:
        async def read(uri: str) -> bytes | Reject:
            return await self._reader(uri).read(uri, self._image.max_image_bytes)

        arrivals.put(place, await self._ask(uri, read, arrivals))

    async def _fetch_files(self, files: Sequence[tuple[int, str]], arrivals: Arrivals) -> None:
        """Read several files in one thread: a way there and back for each would cost more than a small file does."""
        async with self._slots:
            await arrivals.room()
            uris, loop = [uri for _, uri in files], asyncio.get_running_loop()
            reading = loop.run_in_executor(self._threads, _read_files, uris, self._image.max_image_bytes)
            try:
                found = await asyncio.wait_for(reading, self._image.fetch_timeout_s)
            except TimeoutError:
                found = []
        for (place, _), data in zip(files, found, strict=False):
            arrivals.put(place, data)
        await asyncio.gather(*(self._fetch_one(place, uri, arrivals) for place, uri in files[len(found) :]))

    async def _ask(self, uri: str, access: Access[T], arrivals: Arrivals | None = None) -> T | Reject:
        if objection := self._objection(uri):
            return Reject(RejectReason.UNSAFE_URI, urls.redact(f"{objection}: {uri}"))
        async with self._slots:
            if arrivals:
                await arrivals.room()
            return await self._in_time(uri, access)

    async def _in_time(self, uri: str, access: Access[T]) -> T | Reject:
        seen = ["no answer"]
        try:
            async with asyncio.timeout(self._image.fetch_timeout_s):
                return await self._retrying(uri, access, seen)
        except TimeoutError:
            detail = f"not delivered within {self._image.fetch_timeout_s:g} s ({seen[-1]})"
            return Reject(RejectReason.FETCH_FAILED, detail)

    async def _retrying(self, uri: str, access: Access[T], seen: list[str]) -> T | Reject:
        for attempt in range(self._image.fetch_retries + 1):
            try:
                return await access(uri)
            except InputError as error:  # the store's package is not installed
                return Reject(RejectReason.FETCH_FAILED, str(error))
            except Exception as error:  # each store raises its own kinds; diagnose() keeps type and text
                fault = diagnose(error)
            if fault.is_of_bucket:  # which says nothing of the image
                return Reject(RejectReason.FETCH_FAILED, fault.detail)
            if not fault.is_transient:
                return fault.reject
            seen.append(fault.detail)
            if attempt < self._image.fetch_retries:
                await asyncio.sleep(pause_s(attempt, fault.retry_after_s))
        return Reject(fault.reason, f"{fault.detail} (tried {self._image.fetch_retries + 1} times)")

    def _objection(self, uri: str) -> str | None:
        """Return why a list that lies in a remote store may not point here, if so."""
        if self._is_trusted:
            return None
        scheme = urls.scheme(uri)
        if scheme not in _LIST_SCHEMES:
            return f"{scheme} URIs are not followed in a remote list (--allow-local-uris)"
        if scheme in _SCHEMES_OF_HOSTS and hosts.is_inner(urls.host(uri)) and not hosts.is_same(uri, self._input):
            return f"{hosts.UNSAFE} (--allow-local-uris)"
        return None

    @property
    def _is_trusted(self) -> bool:
        return self._access.allow_local_uris or urls.scheme(self._input) == "file"

    def _reader(self, uri: str) -> "_Reader":
        scheme = urls.scheme(uri)
        place = f"{scheme}, own server" if hosts.is_same(uri, self._input) else scheme
        if place not in self._stores:
            self._stores[place] = self._open_reader(uri, scheme)
        return self._stores[place]

    def _open_reader(self, uri: str, scheme: str) -> "_Reader":
        options = self._options(scheme)
        if scheme == "file":
            return _LocalReader(self._threads)
        if scheme in ("http", "https"):
            guard = None if self._is_trusted else hosts.socket_guard(self._input)
            options = options if hosts.is_same(uri, self._input) else _without_secrets(options)
            return _HttpReader(uri, options, self._image.fetch_concurrency, guard)
        if scheme == "s3":
            return _S3Reader(uri, options, self._image.fetch_concurrency)
        return _StoreReader(uri, options, self._threads)

    def _options(self, scheme: str) -> dict[str, Any]:
        """Return the storage options for one kind of store: they are those of the input's own, never of another."""
        own = urls.scheme(self._input)
        same = own == scheme or {own, scheme} <= {"http", "https"} or {own, scheme} <= {"az", "abfs", "abfss"}
        is_store_behind_local_list = own == "file" and not scheme.startswith("http")
        return dict(self._access.storage_options) if same or is_store_behind_local_list else {}


def _without_secrets(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options for a web server that is not the input's own: it is not to learn who we are there."""
    client = {name: value for name, value in options.get("client_kwargs", {}).items() if name not in _SECRETS}
    kept = {name: value for name, value in options.items() if name not in _SECRETS}
    return {**kept, "client_kwargs": client} if client else {k: v for k, v in kept.items() if k != "client_kwargs"}


def _present(rows: pa.Table, place: int) -> bytes | Reject:
    """Return what a row brings itself: its bytes, or why it has none."""
    if (reason := rows["reason"][place]).is_valid:
        return Reject(RejectReason(reason.as_py()), rows["detail"][place].as_py())
    data: bytes = rows["data"][place].as_py()
    return data


class _Reader:
    """Reads one object of one kind of store; raises whatever that store raises."""

    async def read(self, uri: str, max_bytes: int) -> bytes | Reject:
        raise NotImplementedError

    async def stamp(self, uri: str) -> str | Reject:
        raise NotImplementedError


class _LocalReader(_Reader):
    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self._threads = threads

    async def read(self, uri: str, max_bytes: int) -> bytes | Reject:
        return await asyncio.get_running_loop().run_in_executor(self._threads, _read_local, uri, max_bytes)

    async def stamp(self, uri: str) -> str | Reject:
        return await asyncio.get_running_loop().run_in_executor(self._threads, _stamp_local, uri)


def _stamp_local(uri: str) -> str | Reject:
    found = os.stat(urls.local_path(uri))  # noqa: PTH116 - paths stay strings here
    if not stat.S_ISREG(found.st_mode):
        return Reject(RejectReason.MISSING, _NO_FILE)
    return _joined(found.st_size, found.st_mtime_ns)


def _joined(*facts: object) -> str:
    return "-".join(str(fact).strip('"') for fact in facts if fact)


def _read_files(uris: Sequence[str], max_bytes: int) -> list[bytes | Reject]:
    """Return what the first of some files hold, up to one that cannot be read at once or makes them heavy."""
    found: list[bytes | Reject] = []
    num_bytes = 0
    for uri in uris:
        try:
            data = _read_local(uri, max_bytes)
        except (OSError, ValueError):  # the last for a name with a null byte; who reads it alone says what it is
            break
        found.append(data)
        num_bytes += 0 if isinstance(data, Reject) else len(data)
        if num_bytes > _CHUNK_BYTES:
            break
    return found


def _read_local(uri: str, max_bytes: int) -> bytes | Reject:
    descriptor = os.open(urls.local_path(uri), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe must not block
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            return Reject(RejectReason.MISSING, _NO_FILE)
        if reject := too_large(found.st_size, max_bytes):
            return reject
        with open(descriptor, "rb", buffering=0, closefd=False) as file:
            return _judge(file.read(found.st_size), max_bytes)
    finally:
        os.close(descriptor)


class _HttpReader(_Reader):
    def __init__(
        self, uri: str, options: dict[str, Any], num_connections: int, socket_factory: Callable[..., Any] | None
    ) -> None:
        client = functools.partial(http_client, num_connections=num_connections, socket_factory=socket_factory)
        self._fs = open_store(uri, {**options, "get_client": client, "skip_instance_cache": True}).fs

    async def read(self, uri: str, max_bytes: int) -> bytes | Reject:
        session = await self._fs.set_session()
        async with session.get(self._fs.encode_url(uri), **self._fs.kwargs) as response:
            response.raise_for_status()
            return await _read_body(response.content, response.content_length, max_bytes)

    async def stamp(self, uri: str) -> str | Reject:
        session = await self._fs.set_session()
        async with session.head(self._fs.encode_url(uri), allow_redirects=True, **self._fs.kwargs) as response:
            if response.status in _NO_HEAD:
                return ""
            response.raise_for_status()
            headers = response.headers
            return _joined(headers.get("ETag") or headers.get("Last-Modified"), headers.get("Content-Length"))


class _S3Reader(_Reader):
    def __init__(self, uri: str, options: dict[str, Any], num_connections: int) -> None:
        config_kwargs = {"max_pool_connections": max(10, num_connections), **options.get("config_kwargs", {})}
        self._store = S3Store(uri, {**options, "config_kwargs": config_kwargs, "skip_instance_cache": True})
        self._fs = self._store.fs

    async def read(self, uri: str, max_bytes: int) -> bytes | Reject:
        bucket, key = self._store.bucket_and_key(uri)
        answer = await self._fs._call_s3("get_object", Bucket=bucket, Key=key)
        async with answer["Body"] as body:
            return await _read_body(body, answer["ContentLength"], max_bytes)

    async def stamp(self, uri: str) -> str | Reject:
        bucket, key = self._store.bucket_and_key(uri)
        answer = await self._fs._call_s3("head_object", Bucket=bucket, Key=key)
        return _joined(answer["ETag"], answer["ContentLength"])

    def stamps_in(self, folder: str, wanted: Set[str]) -> dict[str, str]:
        """Return the stamps of these objects of a folder, as far as its listing has them before it costs more."""
        found: dict[str, str] = {}
        with suppress(StoreError):  # who may read objects may not be allowed to list them
            pages = self._store.stamped_pages(folder + "/")
            for page in islice(pages, max(1, len(wanted) // _ASKED_PER_PAGE)):
                found |= {uri: _joined(*facts) for uri, *facts in page if uri in wanted}
                if len(found) == len(wanted):
                    break
        return found


class _StoreReader(_Reader):
    """Any other fsspec store, in a thread: asks for the size, then for no more than that."""

    def __init__(self, uri: str, options: dict[str, Any], threads: ThreadPoolExecutor) -> None:
        self._store: Store = open_store(uri, options)
        self._threads = threads

    async def read(self, uri: str, max_bytes: int) -> bytes | Reject:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._read, uri, max_bytes)

    def _read(self, uri: str, max_bytes: int) -> bytes | Reject:
        path = self._store.path(uri)
        size_bytes = self._store.fs.info(path).get("size")
        return too_large(size_bytes or 0, max_bytes) or _judge(self._store.fs.cat_file(path), max_bytes)

    async def stamp(self, uri: str) -> str | Reject:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._stamp, uri)

    def _stamp(self, uri: str) -> str | Reject:
        found = self._store.fs.info(self._store.path(uri))
        return _joined(*(found.get(name) for name in ("size", *_CHANGING)))


async def _read_body(body: Any, size_bytes: int | None, max_bytes: int) -> bytes | Reject:
    """Return a body, or `too_large` before it is read where its length is told, else once it has passed the limit."""
    if reject := too_large(size_bytes or 0, max_bytes):
        return reject
    data = bytearray()
    while len(data) <= max_bytes and (chunk := await body.read(_CHUNK_BYTES)):
        data += chunk
    return _judge(bytes(data), max_bytes)


def _judge(data: bytes, max_bytes: int) -> bytes | Reject:
    if not data:
        return Reject(RejectReason.EMPTY, "0 bytes")
    return data if len(data) <= max_bytes else Reject(RejectReason.TOO_LARGE, f"more than {max_bytes:,} bytes")
