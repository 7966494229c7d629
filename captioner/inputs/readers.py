"""Readers of single objects, one for each kind of store: its bytes, or its version without its bytes.

A reader raises whatever its store raises; `fetching` knows retries, deadlines and which URIs may be read.
"""

import asyncio
import functools
import os
import stat
from collections.abc import Callable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http import HTTPStatus
from itertools import islice
from typing import TYPE_CHECKING, Any

from captioner.inputs.blocks import too_large
from captioner.schema import Reject, RejectReason
from captioner.storage import Location, S3Store, Store, http_client, open_store, urls
from captioner.storage.faults import StoreError

if TYPE_CHECKING:
    import aiohttp

__all__ = ["HttpReader", "LocalReader", "Reader", "S3Reader", "StoreReader", "is_folder_away", "read_files"]

_CHUNK_BYTES = 1 << 20
_NO_FILE = "not a file but a folder, a device or a pipe"
_NO_HEAD = (403, 405, 501)  # answers of servers that support GET but not HEAD
_CHANGING = ("ETag", "etag", "md5Hash", "crc32c", "content_md5", "mtime", "LastModified", "last_modified", "created")
_ASKED_PER_PAGE = 10  # requests for single objects that cost as much as one page of a listing


class Reader:
    """Reads one object of one kind of store; raises whatever that store raises."""

    async def read(self, uri: str, max_bytes: int) -> bytes | Reject:
        """Return the bytes of the object, or why it cannot be read: empty, too large, not a file."""
        raise NotImplementedError

    async def version(self, uri: str) -> str | Reject:
        """Return the version of the object, a text that changes when it does; empty where the store has none."""
        raise NotImplementedError


class LocalReader(Reader):
    """The local file system, in threads."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self._threads = threads

    async def read(self, uri: str, max_bytes: int) -> bytes | Reject:
        """As Reader.read."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, _read_local, uri, max_bytes)

    async def version(self, uri: str) -> str | Reject:
        """As Reader.version."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, _version_of_file, uri)


def _version_of_file(uri: str) -> str | Reject:
    found = os.stat(urls.local_path(uri))  # noqa: PTH116 - paths stay strings here
    if not stat.S_ISREG(found.st_mode):
        return Reject(RejectReason.MISSING, _NO_FILE)
    return _joined(found.st_size, found.st_mtime_ns)


def _joined(*facts: object) -> str:
    return "-".join(str(fact).strip('"') for fact in facts if fact)


def read_files(uris: Sequence[str], max_bytes: int) -> list[bytes | Reject]:
    """Return the bytes of the first files, up to one that cannot be read or until they exceed 1 MiB."""
    found: list[bytes | Reject] = []
    num_bytes = 0
    for uri in uris:
        try:
            data = _read_local(uri, max_bytes)
        except (OSError, ValueError):  # ValueError for a null byte in a name; reading it alone finds the reason
            break
        found.append(data)
        num_bytes += 0 if isinstance(data, Reject) else len(data)
        if num_bytes > _CHUNK_BYTES:
            break
    return found


def is_folder_away(folder: str) -> bool:
    """Return whether a local folder is missing or empty, as on a disk that is not mounted."""
    try:
        with os.scandir(urls.local_path(folder)) as entries:
            return next(entries, None) is None
    except FileNotFoundError:
        return True
    except (OSError, ValueError):  # an impossible name, or a folder that may not be listed
        return False


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


class HttpReader(Reader):
    """Web servers."""

    def __init__(
        self, uri: str, options: dict[str, Any], num_connections: int, socket_factory: Callable[..., Any] | None
    ) -> None:
        client = functools.partial(
            http_client, home=uri, num_connections=num_connections, socket_factory=socket_factory
        )
        self._fs = open_store(uri, {**options, "get_client": client, "skip_instance_cache": True}).fs

    async def read(self, uri: str, max_bytes: int) -> bytes | Reject:
        """As Reader.read."""
        session = await self._fs.set_session()
        async with session.get(self._fs.encode_url(uri), **self._fs.kwargs) as response:
            _check_status(response)
            return await _read_body(response.content, response.content_length, max_bytes)

    async def version(self, uri: str) -> str | Reject:
        """As Reader.version."""
        session = await self._fs.set_session()
        async with session.head(self._fs.encode_url(uri), allow_redirects=True, **self._fs.kwargs) as response:
            if response.status in _NO_HEAD:
                return ""
            _check_status(response)
            headers = response.headers
            return _joined(headers.get("ETag") or headers.get("Last-Modified"), headers.get("Content-Length"))


def _check_status(response: "aiohttp.ClientResponse") -> None:
    """Raise for an answer that is not the whole object: an error, a part of it, a redirect to nowhere."""
    response.raise_for_status()
    if response.status == HTTPStatus.PARTIAL_CONTENT:
        raise EOFError(f"HTTP 206, only {response.headers.get('Content-Range', 'a part')}, which was not asked for")
    if response.status >= HTTPStatus.MULTIPLE_CHOICES:
        import aiohttp

        raise aiohttp.ClientResponseError(
            response.request_info, response.history, status=response.status, message="a redirect without Location"
        )


class S3Reader(Reader):
    """S3 and compatible stores."""

    def __init__(self, uri: str, options: dict[str, Any], num_connections: int) -> None:
        config_kwargs = {"max_pool_connections": max(10, num_connections), **options.get("config_kwargs", {})}
        self._store = S3Store(Location(uri, {**options, "config_kwargs": config_kwargs, "skip_instance_cache": True}))
        self._fs = self._store.fs

    async def read(self, uri: str, max_bytes: int) -> bytes | Reject:
        """As Reader.read."""
        bucket, key = self._store.bucket_and_key(uri)
        answer = await self._fs._call_s3("get_object", Bucket=bucket, Key=key)
        async with answer["Body"] as body:
            return await _read_body(body, answer["ContentLength"], max_bytes)

    async def version(self, uri: str) -> str | Reject:
        """As Reader.version."""
        bucket, key = self._store.bucket_and_key(uri)
        answer = await self._fs._call_s3("head_object", Bucket=bucket, Key=key)
        return _joined(answer["ETag"], answer["ContentLength"])

    def versions_in(self, folder: str, wanted: Set[str]) -> dict[str, str]:
        """Return the versions of the objects that a listing of their folder finds at less cost than single requests."""
        found: dict[str, str] = {}
        with suppress(StoreError):  # credentials may allow reading but not listing
            pages = self._store.versioned_pages(folder + "/")
            for page in islice(pages, max(1, len(wanted) // _ASKED_PER_PAGE)):
                found |= {uri: _joined(*facts) for uri, *facts in page if uri in wanted}
                if len(found) == len(wanted):
                    break
        return found


class StoreReader(Reader):
    """Any other fsspec store, in a thread: asks for the size before it reads."""

    def __init__(self, uri: str, options: dict[str, Any], threads: ThreadPoolExecutor) -> None:
        self._store: Store = open_store(uri, options)
        self._threads = threads

    async def read(self, uri: str, max_bytes: int) -> bytes | Reject:
        """As Reader.read."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._read, uri, max_bytes)

    def _read(self, uri: str, max_bytes: int) -> bytes | Reject:
        path = self._store.path(uri)
        size_bytes = self._store.fs.info(path).get("size")
        return too_large(size_bytes or 0, max_bytes) or _judge(self._store.fs.cat_file(path), max_bytes)

    async def version(self, uri: str) -> str | Reject:
        """As Reader.version."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._version, uri)

    def _version(self, uri: str) -> str | Reject:
        found = self._store.fs.info(self._store.path(uri))
        return _joined(*(found.get(name) for name in ("size", *_CHANGING)))


async def _read_body(body: Any, size_bytes: int | None, max_bytes: int) -> bytes | Reject:
    """Return a body, or `too_large`: before it is read if its length is known, else once it exceeds the limit."""
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
