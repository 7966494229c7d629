"""How one object is read from each kind of store, and what the store says of it without its bytes.

A reader raises whatever its store raises; `fetching` knows retries, deadlines and what may be read.
"""

import asyncio
import functools
import os
import stat
from collections.abc import Callable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from typing import Any

from captioner.rows import Reject, RejectReason
from captioner.sources import urls
from captioner.sources.blocks import too_large
from captioner.sources.faults import StoreError
from captioner.sources.store import S3Store, Store, http_client, open_store

__all__ = ["HttpReader", "LocalReader", "Reader", "S3Reader", "StoreReader", "read_files"]

_CHUNK_BYTES = 1 << 20
_NO_FILE = "not a file but a folder, a device or a pipe"
_NO_HEAD = (403, 405, 501)  # what servers answer that give the object but not what they know of it
_CHANGING = ("ETag", "etag", "md5Hash", "crc32c", "content_md5", "mtime", "LastModified", "last_modified", "created")
_ASKED_PER_PAGE = 10  # single questions that cost as much as a page of a listing


class Reader:
    """Reads one object of one kind of store; raises whatever that store raises."""

    async def read(self, uri: str, max_bytes: int) -> bytes | Reject:
        """Return the object's bytes, or why it is none to read: empty, too large, not a file."""
        raise NotImplementedError

    async def stamp(self, uri: str) -> str | Reject:
        """Return what the store says of the object, another text once it is another; empty where it does not say."""
        raise NotImplementedError


class LocalReader(Reader):
    """The local file system, in threads."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self._threads = threads

    async def read(self, uri: str, max_bytes: int) -> bytes | Reject:
        """As Reader.read."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, _read_local, uri, max_bytes)

    async def stamp(self, uri: str) -> str | Reject:
        """As Reader.stamp."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, _stamp_local, uri)


def _stamp_local(uri: str) -> str | Reject:
    found = os.stat(urls.local_path(uri))  # noqa: PTH116 - paths stay strings here
    if not stat.S_ISREG(found.st_mode):
        return Reject(RejectReason.MISSING, _NO_FILE)
    return _joined(found.st_size, found.st_mtime_ns)


def _joined(*facts: object) -> str:
    return "-".join(str(fact).strip('"') for fact in facts if fact)


def read_files(uris: Sequence[str], max_bytes: int) -> list[bytes | Reject]:
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
            response.raise_for_status()
            return await _read_body(response.content, response.content_length, max_bytes)

    async def stamp(self, uri: str) -> str | Reject:
        """As Reader.stamp."""
        session = await self._fs.set_session()
        async with session.head(self._fs.encode_url(uri), allow_redirects=True, **self._fs.kwargs) as response:
            if response.status in _NO_HEAD:
                return ""
            response.raise_for_status()
            headers = response.headers
            return _joined(headers.get("ETag") or headers.get("Last-Modified"), headers.get("Content-Length"))


class S3Reader(Reader):
    """S3 and whatever speaks its protocol."""

    def __init__(self, uri: str, options: dict[str, Any], num_connections: int) -> None:
        config_kwargs = {"max_pool_connections": max(10, num_connections), **options.get("config_kwargs", {})}
        self._store = S3Store(uri, {**options, "config_kwargs": config_kwargs, "skip_instance_cache": True})
        self._fs = self._store.fs

    async def read(self, uri: str, max_bytes: int) -> bytes | Reject:
        """As Reader.read."""
        bucket, key = self._store.bucket_and_key(uri)
        answer = await self._fs._call_s3("get_object", Bucket=bucket, Key=key)
        async with answer["Body"] as body:
            return await _read_body(body, answer["ContentLength"], max_bytes)

    async def stamp(self, uri: str) -> str | Reject:
        """As Reader.stamp."""
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


class StoreReader(Reader):
    """Any other fsspec store, in a thread: asks for the size, then for no more than that."""

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

    async def stamp(self, uri: str) -> str | Reject:
        """As Reader.stamp."""
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
