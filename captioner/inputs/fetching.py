"""Fetch many images at once from any store: each URI gives its bytes or a typed reason, always in time.

    fetcher = Fetcher(config.input_path, config.input, config.image)
    for outcome in fetcher.fetch(uris): ...         # bytes | Reject, in the order of the URIs
    for outcome in fetcher.fetch_rows(table): ...   # the same for rows as `read_unit` gives them
    for outcome in fetcher.versions(uris): ...        # str | Reject: a text that changes when the object changes

Knows retries, deadlines, the size guard and which URIs a list may point to; does not know what an image is.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import fsspec.asyn
import pyarrow as pa

from captioner.config import ImageConfig, InputConfig
from captioner.errors import InputError
from captioner.inputs.access import host_guard
from captioner.inputs.fetch_queue import Fetched, FetchQueue
from captioner.inputs.readers import HttpReader, LocalReader, Reader, S3Reader, StoreReader, is_folder_away, read_files
from captioner.schema import Reject, RejectReason
from captioner.storage import hosts, pause_s, urls
from captioner.storage.faults import Fault, diagnose

__all__ = ["Fetcher"]

T = TypeVar("T")
Access = Callable[[str], Awaitable[T | Reject]]

_VERSIONS_AT_ONCE = 10_000
_LISTED_FROM = 100  # wanted objects of a folder from which it is listed
_HELD_BYTES = 64 << 20  # fetched and not yet decoded
_ROWS_AT_ONCE = 64
_SCHEMES_OF_HOSTS = frozenset({"http", "https", "hdfs"})
_WEB = frozenset({"http", "https"})
_SECRETS = frozenset({"headers", "auth", "cookies", "cookie_jar"})
_OPEN_OPTIONS = frozenset({"encoded", "proxy", "ssl"})
_OPEN_CLIENT_OPTIONS = frozenset({"trust_env", "proxy", "timeout", "read_bufsize", "max_line_size", "max_field_size"})
_LIST_SCHEMES = frozenset({"s3", "gs", "az", "abfs", "abfss", "http", "https", "hf", "oss", "oci", "hdfs", "memory"})


class Fetcher:
    """Fetches images as one job is configured to. Can be pickled and shared by threads.

    named: what this user named on the command line, whose URIs are trusted if it is local; by default the input."""

    def __init__(self, input_path: str, access: InputConfig, image: ImageConfig, named: str | None = None) -> None:
        self._input = urls.absolute(input_path)
        self._named = self._input if named is None else urls.absolute(named)
        self._access = access
        self._image = image
        self._connect()

    def _connect(self) -> None:
        self._readers: dict[tuple[str, str], Reader] = {}  # by server: a reader takes its host from its first URI
        self._folders: dict[str, asyncio.Future[bool]] = {}
        self._threads = ThreadPoolExecutor(self._image.fetch_concurrency, "fetch")
        self._is_online = False  # whether a web server answered: before that, an unknown host may mean no network
        self._slots = asyncio.Semaphore(self._image.fetch_concurrency)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._input, self._access, self._image, self._named)

    def fetch(self, uris: Sequence[str]) -> list[bytes | Reject]:
        """Return the bytes behind each URI, or why there are none. Never raises for a URI or its store."""
        found: dict[int, bytes | Reject] = {}
        for queue in self._stream(list(enumerate(uris))):
            found.update(queue)
        return [found[index] for index in range(len(uris))]

    def versions(self, uris: Sequence[str]) -> list[str | Reject]:
        """Return the version of each object: a text that changes when the object changes. Never raises.

        Empty where the store has none; a reject where there is no such object or the store fails.
        """
        known = self._listed_versions(uris)
        asked = [uri for uri in uris if uri not in known]
        for start in range(0, len(asked), _VERSIONS_AT_ONCE):
            these = asked[start : start + _VERSIONS_AT_ONCE]
            found = asyncio.run_coroutine_threadsafe(self._versions_of(these), fsspec.asyn.get_loop()).result()
            known |= zip(these, found, strict=True)
        return [known[uri] for uri in uris]

    def _listed_versions(self, uris: Sequence[str]) -> dict[str, str | Reject]:
        """Return the versions of objects on S3 whose folder is worth listing: a thousand come in one answer."""
        folders: dict[str, set[str]] = {}
        for uri in uris:
            if urls.scheme(uri) == "s3":
                folders.setdefault(urls.parent(uri), set()).add(uri)
        known: dict[str, str | Reject] = {}
        for folder, wanted in folders.items():
            reader = self._reader(folder)
            if len(wanted) >= _LISTED_FROM and isinstance(reader, S3Reader):
                known |= reader.versions_in(folder, wanted)
        return known

    def fetch_rows(self, rows: pa.Table) -> list[bytes | Reject]:
        """Return the bytes of each row of `source_schema`, fetched if it has only a URI, or why there are none."""
        found: dict[int, bytes | Reject] = {}
        for queue in self.stream_rows(rows):
            found.update(queue)
        return [found[index] for index in range(rows.num_rows)]

    def stream_rows(self, rows: pa.Table) -> Iterator[list[Fetched]]:
        """Yield the same with the index of the row, a few at a time as they arrive.

        Memory holds about 100 MB of fetched images, and those that are being fetched.
        """
        uris = rows.column("uri").to_pylist()
        here = [index for index, uri in enumerate(uris) if uri is None or rows["reason"][index].is_valid]
        for start in range(0, len(here), _ROWS_AT_ONCE):
            yield [(index, _present(rows, index)) for index in here[start : start + _ROWS_AT_ONCE]]
        absent = set(range(len(uris))).difference(here)
        yield from self._stream([(index, uris[index]) for index in sorted(absent)])

    async def _versions_of(self, uris: Sequence[str]) -> list[str | Reject]:
        return list(await asyncio.gather(*(self._ask(uri, lambda uri: self._reader(uri).version(uri)) for uri in uris)))

    def _stream(self, wanted: Sequence[tuple[int, str]]) -> Iterator[list[Fetched]]:
        if not wanted:
            return
        loop = fsspec.asyn.get_loop()
        queue = FetchQueue(loop, _HELD_BYTES)
        future = asyncio.run_coroutine_threadsafe(self._fetch_all(wanted, queue), loop)
        future.add_done_callback(lambda _: queue.close())
        try:
            yield from queue
        finally:
            future.cancel()
        future.result()

    async def _fetch_all(self, wanted: Sequence[tuple[int, str]], queue: FetchQueue) -> None:
        self._folders.clear()  # what was there a batch ago may be unmounted now
        local = [(index, uri) for index, uri in wanted if urls.scheme(uri) == "file" and not self._why_unsafe(uri)]
        indices = {index for index, _ in local}
        step = -(-len(local) // self._image.fetch_concurrency) or 1
        await asyncio.gather(
            *(self._fetch_files(local[start : start + step], queue) for start in range(0, len(local), step)),
            *(self._fetch_one(index, uri, queue) for index, uri in wanted if index not in indices),
        )

    async def _fetch_one(self, index: int, uri: str, queue: FetchQueue) -> None:
        async def read(uri: str) -> bytes | Reject:
            return await self._reader(uri).read(uri, self._image.max_image_bytes)

        queue.put(index, await self._ask(uri, read, queue))

    async def _fetch_files(self, files: Sequence[tuple[int, str]], queue: FetchQueue) -> None:
        """Read several files at a time in one thread: a thread switch for each costs more than reading a small file."""
        while files:
            async with self._slots:
                await queue.room()
                uris, loop = [uri for _, uri in files], asyncio.get_running_loop()
                reading = loop.run_in_executor(self._threads, read_files, uris, self._image.max_image_bytes)
                try:
                    found = await asyncio.wait_for(reading, self._image.fetch_timeout_s)
                except TimeoutError:
                    found = []
            for (index, _), data in zip(files, found, strict=False):
                queue.put(index, data)
            files = files[len(found) :]
            if not found:  # the first of them cannot be read, or not in time
                await asyncio.gather(*(self._fetch_one(index, uri, queue) for index, uri in files))
                return

    async def _ask(self, uri: str, access: Access[T], queue: FetchQueue | None = None) -> T | Reject:
        if refusal := self.refusal(uri):
            return refusal
        async with self._slots:
            if queue:
                await queue.room()
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
                found = await access(uri)
                self._is_online |= urls.scheme(uri) in _WEB
                return found
            except InputError as error:  # the store's package is not installed
                return Reject(RejectReason.FETCH_FAILED, str(error))
            except Exception as error:  # each store raises its own kinds; diagnose() keeps type and text
                fault = diagnose(error)
            if settled := await self._settled(uri, fault):
                return settled
            seen.append(fault.detail)
            if attempt < self._image.fetch_retries:
                await asyncio.sleep(pause_s(attempt, fault.retry_after_s))
        return Reject(fault.reason, f"{fault.detail} (tried {self._image.fetch_retries + 1} times)")

    async def _settled(self, uri: str, fault: Fault) -> Reject | None:
        """Return the reject if a single try is enough to know; None where a retry may succeed."""
        if await self._is_store_out_of_reach(uri, fault):
            return Reject(RejectReason.FETCH_FAILED, fault.detail)
        return None if fault.is_transient else fault.reject

    async def _is_store_out_of_reach(self, uri: str, fault: Fault) -> bool:
        """Return whether the fault is that of an image's bucket or disk, or of our own network."""
        if fault.reason == RejectReason.MISSING:
            return fault.is_bucket_missing or (
                urls.scheme(uri) == "file" and await self._is_missing_or_empty(urls.parent(uri))
            )
        is_known_to_work = self._is_online and urls.scheme(uri) in _WEB
        return fault.reason == RejectReason.UNREACHABLE and not is_known_to_work

    async def _is_missing_or_empty(self, folder: str) -> bool:
        """Return whether a local folder is away. It is asked once a batch, in a thread: a mount may hang."""
        if folder not in self._folders:
            loop = asyncio.get_running_loop()
            self._folders[folder] = loop.run_in_executor(self._threads, is_folder_away, folder)
        return await asyncio.shield(self._folders[folder])

    def refusal(self, uri: str) -> Reject | None:
        """Return the reject of a URI to which something in a remote store may not point, or None."""
        why = self._why_unsafe(uri)
        return Reject(RejectReason.UNSAFE_URI, urls.redact(f"{why}: {uri}")) if why else None

    def _why_unsafe(self, uri: str) -> str | None:
        scheme, host = urls.scheme(uri), urls.host(uri)
        if not self._is_trusted and scheme not in _LIST_SCHEMES:
            return f"{scheme} URIs are not followed in a remote list (--allow-local-uris)"
        if not self._is_guarded or scheme not in _SCHEMES_OF_HOSTS or hosts.is_same(uri, self._named):
            return None
        if hosts.is_inner(host):
            return f"{hosts.UNSAFE} (--allow-local-uris)"
        is_denied = self._access.deny_private_hosts and hosts.is_private(host)
        return f"{hosts.PRIVATE} (--deny-private-hosts)" if is_denied else None

    @property
    def _is_guarded(self) -> bool:
        """Whether a URI may not lead to an inner host."""
        return self._access.deny_private_hosts or not self._is_trusted

    @property
    def _is_trusted(self) -> bool:
        return self._access.allow_local_uris or urls.scheme(self._named) == "file"

    def _reader(self, uri: str) -> Reader:
        server = urls.server(uri)
        if server[0] in _WEB and server != urls.server(self._input):
            server = server[0], ""  # one session for the hosts of a list, which may be millions
        if server not in self._readers:
            self._readers[server] = self._open_reader(uri, urls.scheme(uri))
        return self._readers[server]

    def _open_reader(self, uri: str, scheme: str) -> Reader:
        options = self._options(uri)
        if scheme == "file":
            return LocalReader(self._threads)
        if scheme in ("http", "https"):
            guard = host_guard(self._access, self._named) if self._is_guarded else None
            return HttpReader(uri, options, self._image.fetch_concurrency, guard)
        if scheme == "s3":
            return S3Reader(uri, options, self._image.fetch_concurrency)
        return StoreReader(uri, options, self._threads)

    def _options(self, uri: str) -> dict[str, Any]:
        """Return the storage options for a URI: the input's own, whole on the same server alone.

        Options given with a local list are for the stores that it names; its web servers get those without secrets."""
        options, kind, own = dict(self._access.storage_options), urls.scheme(uri), urls.scheme(self._input)
        if kind in _WEB and own in _WEB:
            return options if urls.server(uri) == urls.server(self._input) else _without_secrets(options)
        if own == "file":
            return _for_any_server(options) if kind in _WEB else options
        return urls.shared_options(uri, self._input, options)


def _for_any_server(options: dict[str, Any]) -> dict[str, Any]:
    """Return those of a local list's options that are for the web, and may go to any server: no credentials."""
    kept = {name: value for name, value in options.items() if name in _OPEN_OPTIONS}
    client = options.get("client_kwargs")
    session = {k: v for k, v in client.items() if k in _OPEN_CLIENT_OPTIONS} if isinstance(client, dict) else {}
    return {**kept, "client_kwargs": session} if session else kept


def _without_secrets(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options without credentials, for a web server that is not the input's own."""
    client = {name: value for name, value in options.get("client_kwargs", {}).items() if name not in _SECRETS}
    kept = {name: value for name, value in options.items() if name not in _SECRETS}
    return {**kept, "client_kwargs": client} if client else {k: v for k, v in kept.items() if k != "client_kwargs"}


def _present(rows: pa.Table, index: int) -> bytes | Reject:
    """Return the bytes that a row holds itself, or why it has none."""
    if (reason := rows["reason"][index]).is_valid:
        return Reject(RejectReason(reason.as_py()), rows["detail"][index].as_py())
    data: bytes = rows["data"][index].as_py()
    return data
