"""Bytes of many images at once, from any store: each URI gives its bytes or a typed reason, always in time.

    fetcher = Fetcher(config.input_path, config.input, config.image)
    for outcome in fetcher.fetch(uris): ...         # bytes | Reject, in the order of the URIs
    for outcome in fetcher.fetch_rows(table): ...   # the same for rows as `read_unit` gives them
    for outcome in fetcher.stamps(uris): ...        # str | Reject: what the store says of an object, without its bytes

Knows retries, deadlines, the size guard and which URIs a list may point to; does not know what an image is.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import fsspec.asyn
import pyarrow as pa

from captioner.config import ImageConfig, InputConfig
from captioner.errors import InputError
from captioner.rows import Reject, RejectReason
from captioner.sources import hosts, urls
from captioner.sources.arrivals import Arrival, Arrivals
from captioner.sources.faults import Fault, diagnose
from captioner.sources.readers import HttpReader, LocalReader, Reader, S3Reader, StoreReader, read_files
from captioner.sources.store import pause_s

__all__ = ["Fetcher"]

T = TypeVar("T")
Access = Callable[[str], Awaitable[T | Reject]]

_STAMPS_AT_ONCE = 10_000
_LISTED_FROM = 100  # objects of a folder from which on its listing is tried
_HELD_BYTES = 64 << 20  # fetched, and not yet decoded
_ROWS_AT_ONCE = 64
_SCHEMES_OF_HOSTS = frozenset({"http", "https", "hdfs"})
_WEB = frozenset({"http", "https"})
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
        self._stores: dict[str, Reader] = {}
        self._threads = ThreadPoolExecutor(self._image.fetch_concurrency, "fetch")
        self._is_online = False  # whether a web server gave anything; else one that is not there may be our network
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
            if len(wanted) >= _LISTED_FROM and isinstance(reader, S3Reader):
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
            reading = loop.run_in_executor(self._threads, read_files, uris, self._image.max_image_bytes)
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
                found = await access(uri)
                self._is_online |= urls.scheme(uri) in _WEB
                return found
            except InputError as error:  # the store's package is not installed
                return Reject(RejectReason.FETCH_FAILED, str(error))
            except Exception as error:  # each store raises its own kinds; diagnose() keeps type and text
                fault = diagnose(error)
            if settled := self._settled(uri, fault):
                return settled
            seen.append(fault.detail)
            if attempt < self._image.fetch_retries:
                await asyncio.sleep(pause_s(attempt, fault.retry_after_s))
        return Reject(fault.reason, f"{fault.detail} (tried {self._image.fetch_retries + 1} times)")

    def _settled(self, uri: str, fault: Fault) -> Reject | None:
        """Return what a single try tells for certain; None where another one may go well."""
        if self._says_nothing_of(uri, fault):
            return Reject(RejectReason.FETCH_FAILED, fault.detail)
        return None if fault.is_transient else fault.reject

    def _says_nothing_of(self, uri: str, fault: Fault) -> bool:
        """Say whether the fault is of what an image lies in: its bucket, its disk, our own network."""
        if fault.reason == RejectReason.MISSING:
            return fault.is_of_bucket or _is_folder_away(uri)
        is_known_to_work = self._is_online and urls.scheme(uri) in _WEB
        return fault.reason == RejectReason.UNREACHABLE and not is_known_to_work

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

    def _reader(self, uri: str) -> Reader:
        scheme = urls.scheme(uri)
        place = f"{scheme}, own server" if hosts.is_same(uri, self._input) else scheme
        if place not in self._stores:
            self._stores[place] = self._open_reader(uri, scheme)
        return self._stores[place]

    def _open_reader(self, uri: str, scheme: str) -> Reader:
        options = self._options(scheme)
        if scheme == "file":
            return LocalReader(self._threads)
        if scheme in ("http", "https"):
            guard = None if self._is_trusted else hosts.socket_guard(self._input)
            options = options if hosts.is_same(uri, self._input) else _without_secrets(options)
            return HttpReader(uri, options, self._image.fetch_concurrency, guard)
        if scheme == "s3":
            return S3Reader(uri, options, self._image.fetch_concurrency)
        return StoreReader(uri, options, self._threads)

    def _options(self, scheme: str) -> dict[str, Any]:
        """Return the storage options for one kind of store: they are those of the input's own, never of another."""
        own = urls.scheme(self._input)
        same = own == scheme or {own, scheme} <= {"http", "https"} or {own, scheme} <= {"az", "abfs", "abfss"}
        is_store_behind_local_list = own == "file" and not scheme.startswith("http")
        return dict(self._access.storage_options) if same or is_store_behind_local_list else {}


def _is_folder_away(uri: str) -> bool:
    """Say whether a local file is missing with all that was to stand beside it, as on a disk that is not mounted."""
    if urls.scheme(uri) != "file":
        return False
    folder = Path(urls.local_path(urls.parent(uri)))
    try:
        return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    except OSError:  # a name that no folder can have, or one that may not be listed
        return False


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
