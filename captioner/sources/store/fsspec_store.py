"""What every store can do, by fsspec; the stores that can do better override it."""

import io
import itertools
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, ClassVar, NamedTuple, TypeVar

import fsspec

from captioner.errors import CaptionerError
from captioner.rows import RejectReason
from captioner.sources import urls
from captioner.sources.faults import StoreError, diagnose, is_taken
from captioner.sources.store.steady_file import SteadyFile

__all__ = ["PAGE_SIZE", "Entry", "Store", "file_or_folder", "in_order", "pause_s"]

T = TypeVar("T")

PAGE_SIZE = 1000  # entries of one listing page, as S3 has it
_READ_RETRIES = 4
_BUFFER_BYTES = {"file": 1 << 18}
_REMOTE_BUFFER_BYTES = 4 << 20
_SCHEMES_WITHOUT_CACHE_OPTION = frozenset({"http", "https", "memory", "file"})


class Entry(NamedTuple):
    """One thing in a store. `size_bytes` is None where the store does not tell."""

    url: str
    size_bytes: int | None
    is_folder: bool = False


def pause_s(attempt: int, retry_after_s: float = 0.0) -> float:
    """Return how long to wait before another attempt: 0.25 s doubling up to 8 s, half to one and a half of it."""
    return max(retry_after_s, min(0.25 * 2.0**attempt, 8.0) * random.uniform(0.5, 1.5))


class Store:
    """A store reached through fsspec."""

    _num_retries = _READ_RETRIES
    _pieces: ClassVar[Mapping[str, Any]] = {}  # how a large file is put there, in the words of its fsspec package

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
        return found and file_or_folder(url, found.get("size"), is_folder=found["type"] == "directory")

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
        """Return a folder's entries, in order."""
        own = self.path(folder).rstrip("/")
        found = self._steady(lambda: self.fs.ls(self.path(folder), detail=True))
        entries = [
            Entry(self.url(info["name"]), info.get("size"), is_folder=info["type"] == "directory")
            for info in found
            if info["name"].rstrip("/") != own
        ]
        return in_order(entries)

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

    def upload(self, url: str, path: str) -> None:
        """Make `url` hold what the local file `path` holds, or leave it as it was; of large files only pieces are held.

        Raises StoreError. On object stores a file in pieces is visible when its last one is there."""
        self._steady(lambda: self.fs.put_file(path, self.path(url), **self._pieces))

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


def file_or_folder(url: str, size_bytes: int | None, *, is_folder: bool) -> Entry:
    """Return the entry of what was found at a URL."""
    return Entry(url.rstrip("/") + "/", None, is_folder=True) if is_folder else Entry(url, size_bytes)


def in_order(entries: list[Entry]) -> list[Entry]:
    """Return entries as a flat listing has them: a folder sorts as its name and a slash."""
    return sorted(entries, key=lambda entry: entry.url.rstrip("/") + "/" if entry.is_folder else entry.url)
