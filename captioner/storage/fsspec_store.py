"""A store reached through fsspec. Subclasses override what they can do better."""

import io
import itertools
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, ClassVar, NamedTuple, TypeVar

import fsspec

from captioner.errors import CaptionerError
from captioner.schema import RejectReason
from captioner.storage import urls
from captioner.storage.faults import Fault, StoreError, diagnose, is_taken
from captioner.storage.location import Location, Place, full_url
from captioner.storage.steady_file import SteadyFile

__all__ = ["MAX_DEPTH", "PAGE_SIZE", "Entry", "Extent", "Store", "file_or_folder", "in_order", "pause_s"]

T = TypeVar("T")

PAGE_SIZE = 1000  # entries of one listing page, as S3 has it
MAX_DEPTH = 100  # of folders in a listing
MAX_FILES = 1 << 30  # of a listing: at 5,000 names a second it takes two days
MAX_BARREN = 1 << 16  # folders, or pages of keys, beyond two for each file: a server may make them up for ever
_READ_RETRIES = 4
_MAX_RETRY_AFTER_S = 30.0
_SCHEMES_WITHOUT_CACHE_OPTION = frozenset({"http", "https", "memory", "file"})


class Entry(NamedTuple):
    """A file or folder in a store. `size_bytes` is None where the store does not say."""

    url: str
    size_bytes: int | None
    is_folder: bool = False


class Extent:
    """How much a listing has found so far. `grow` raises StoreError for one that has no end."""

    def __init__(self, shown: str) -> None:
        self._shown = shown
        self._num_files = self._num_asked = 0

    def grow(self, num_files: int, num_asked: int = 0) -> None:
        """Count files, and what was asked for to find them: folders, or pages of keys."""
        self._num_files += num_files
        self._num_asked += num_asked
        if self._num_files > MAX_FILES:
            self._refuse(f"it has more than {MAX_FILES:,} files")
        if self._num_asked > MAX_BARREN + 2 * self._num_files:
            self._refuse(f"{self._num_asked:,} folders or pages of it held {self._num_files:,} files")

    def _refuse(self, why: str) -> None:
        detail = f"the listing of {self._shown} seems to have no end: {why}; name a folder below it, or pass a list"
        raise StoreError(Fault(RejectReason.FETCH_FAILED, detail))


def pause_s(attempt: int, retry_after_s: float = 0.0) -> float:
    """Return the pause before the next attempt: 0.25 s doubling to 8 s, with 50% jitter.

    retry_after_s: the pause that the server asks for. The pause is at least as long, up to 30 s."""
    return max(min(retry_after_s, _MAX_RETRY_AFTER_S), min(0.25 * 2.0**attempt, 8.0) * random.uniform(0.5, 1.5))


class Store:
    """A store reached through fsspec."""

    buffer_bytes: ClassVar[int] = 4 << 20
    """What a buffered reader asks for at once."""

    _num_retries = _READ_RETRIES
    _pieces: ClassVar[Mapping[str, Any]] = {}  # options of the fsspec package for a large upload

    def __init__(self, location: Location) -> None:
        self.scheme = location.scheme
        self._location = location
        self._opened: tuple[int, Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._location,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self._location)!r})"

    @property
    def fs(self) -> Any:
        """The fsspec filesystem of this process."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), self._connect()
        return self._opened[1]

    def _connect(self) -> Any:
        kind = fsspec.get_filesystem_class(self.scheme)
        options = {**self._url_options(), **self._location.storage_options}
        if self.scheme not in _SCHEMES_WITHOUT_CACHE_OPTION:
            options.setdefault("use_listings_cache", False)  # a cached listing is stale, and holds all names
        return kind(**options)

    def _url_options(self) -> dict[str, Any]:
        """Return the options that the URL holds beside the path: a host, an account."""
        return dict(fsspec.get_filesystem_class(self.scheme)._get_kwargs_from_urls(full_url(self._location)))

    def path(self, place: Place) -> str:
        """Return the path of a place in the filesystem."""
        return str(self.fs._strip_protocol(full_url(place)))

    def url(self, path: str) -> str:
        """Return the URL of a path that the filesystem returned."""
        return path if "://" in path else f"{self.scheme}://{path.lstrip('/')}"

    def info(self, place: Place) -> Entry | None:
        """Return the entry at `place`, of a folder with the URL to list it by; None for nothing. Raises StoreError."""
        found = self._or_none(lambda: self.fs.info(self.path(place)))
        return found and file_or_folder(full_url(place), found.get("size"), is_folder=found["type"] == "directory")

    def pages(self, prefix: Place) -> Iterator[list[Entry]]:
        """Yield every file whose URL starts with `prefix`, in a fixed order, at most PAGE_SIZE at a time.

        Memory holds a page and one folder's names. Raises StoreError.
        """
        page: list[Entry] = []
        extent = Extent(urls.shown(full_url(prefix)))
        for entry in self._walk(full_url(prefix), extent):
            extent.grow(1)
            page.append(entry)
            if len(page) == PAGE_SIZE:
                yield page
                page = []
        if page:
            yield page

    def _walk(self, prefix: str, extent: Extent) -> Iterator[Entry]:
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
            elif (identity := self._identity(entry.url)) not in {above for _, above in stack}:
                if len(stack) == MAX_DEPTH:
                    detail = f"it has folders {MAX_DEPTH} deep, {urls.shown(entry.url)[:150]}; does one hold itself?"
                    raise StoreError(Fault(RejectReason.FETCH_FAILED, detail))
                extent.grow(0, 1)
                stack.append((iter(self._children(entry.url)), identity))

    def _identity(self, folder: str) -> object:
        return folder.rstrip("/")

    def _children(self, folder: str) -> list[Entry]:
        """Return a folder's entries in order."""
        own = self.path(folder).rstrip("/")
        found = self.retried(lambda: self.fs.ls(self.path(folder), detail=True))
        entries = [
            Entry(self.url(info["name"]), info.get("size"), is_folder=info["type"] == "directory")
            for info in found
            if info["name"].rstrip("/") != own
        ]
        return in_order(entries)

    def open(self, place: Place) -> BinaryIO:
        """Return a seekable, buffered reader that survives throttling, resets and timeouts. Raises StoreError."""
        return io.BufferedReader(self.open_unbuffered(place), self.buffer_bytes)

    def open_unbuffered(self, place: Place) -> "SteadyFile":
        """Return such a reader without a buffer, for callers that ask for large pieces."""
        return SteadyFile(lambda: self._reader(place), self.retried)

    def _reader(self, place: Place) -> Any:
        return self.fs.open(self.path(place), "rb", cache_type="none")

    def read_bytes(self, place: Place) -> bytes:
        """Return the bytes at `place`. Raises StoreError."""
        return bytes(self.retried(lambda: self.fs.cat_file(self.path(place))))

    def read_or_none(self, place: Place) -> bytes | None:
        """Return the bytes at `place`, None where there is no file: one request, where `info` takes up to four.

        Raises StoreError, also for a bucket that does not exist."""
        try:
            return self.read_bytes(place)
        except StoreError as error:
            if error.fault.reason == RejectReason.MISSING and not error.fault.is_bucket_missing:
                return None
            raise

    def read_range(self, place: Place, start: int, stop: int) -> bytes:
        """Return bytes `start` to `stop` of the file at `place`. Raises StoreError."""
        return bytes(self.retried(lambda: self._exactly(place, start, stop)))

    def _exactly(self, place: Place, start: int, stop: int) -> bytes:
        data: bytes = self.fs.cat_file(self.path(place), start=start, end=stop)
        if len(data) != stop - start:
            raise EOFError(f"{len(data)} of {stop - start} bytes at {start}")
        return data

    def write_atomic(self, place: Place, data: bytes, before_write: Callable[[], None] = lambda: None) -> None:
        """Make `place` hold exactly `data`, or leave it as it was. Raises StoreError.

        before_write: called right before each try, which it prevents by raising a CaptionerError. On object stores
        this is one upload, visible when complete; never `open(.., "wb")`: some stores commit the file on close after
        an error.
        """

        def write() -> None:
            before_write()
            self.fs.pipe_file(self.path(place), data)

        self.retried(write)

    def upload(self, place: Place, path: str) -> None:
        """Make `place` a copy of the local file `path`, or leave it as it was. Memory holds only pieces of it.

        Raises StoreError. On object stores a file in pieces is visible once the last piece is there."""
        self.retried(lambda: self.fs.put_file(path, self.path(place), **self._pieces))

    def create(self, place: Place, data: bytes) -> bool:
        """Make `place` hold `data` unless it exists; return whether it now holds `data`. Raises StoreError.

        Of several callers at the same time one succeeds: on S3 by `If-None-Match: *`, on other stores as far as their
        fsspec package has an exclusive write.
        """
        is_ours = self.retried(lambda: self._create_once(place, data))
        # An earlier try may have succeeded though its answer was lost.
        return is_ours or self.read_or_none(place) == data

    def _create_once(self, place: Place, data: bytes) -> bool:
        try:
            self.fs.pipe_file(self.path(place), data, mode="create")
        except Exception as error:  # each fsspec store raises its own kinds
            if is_taken(error):
                return False
            raise
        return True

    def write_new(self, place: Place, data: bytes) -> bool:
        """As `create`, also where a server ignores or refuses conditional writes: the name is looked at first.

        There, of several callers at the same time the last one stays. Raises StoreError."""
        if self.scheme == "file":
            return self.create(place, data)
        try:
            if (there := self.read_or_none(place)) is not None:
                return there == data
        except StoreError as error:
            if error.fault.reason != RejectReason.FORBIDDEN:  # which S3 says of a missing name, too
                raise
        try:
            if self.create(place, data):
                return True
            is_free = self.read_or_none(place) is None
        except StoreError as error:
            if error.fault.is_transient or error.fault.reason == RejectReason.FORBIDDEN:
                raise
            is_free = True  # else a plain write says what is wrong
        if is_free:
            self.write_atomic(place, data)
        return is_free

    def move(self, place: Place, target: Place) -> None:
        """Move the file at `place` to `target`: copy, then remove. Raises StoreError."""
        self.retried(lambda: self.fs.cp_file(self.path(place), self.path(target)))
        self.remove(place)

    def exchange(self, folder: Place, other: Place) -> bool:
        """Exchange two folders atomically; return False where the store cannot."""
        del folder, other
        return False

    def remove(self, place: Place) -> None:
        """Remove the file at `place`, if there is one. Raises StoreError."""
        self._or_none(lambda: self.fs.rm_file(self.path(place)))

    def entries(self, folder: Place) -> list[Entry]:
        """Return a folder's entries in order; none where there is no such folder. Raises StoreError."""
        return self._or_none(lambda: self._children(full_url(folder))) or []

    def names(self, folder: Place) -> list[str]:
        """Return the sorted names of a folder's files; none where there is no such folder. Raises StoreError."""
        return [urls.name(entry.url) for entry in self.entries(folder) if not entry.is_folder]

    def _or_none(self, access: Callable[[], T]) -> T | None:
        try:
            return self.retried(access)
        except StoreError as error:
            if error.fault.reason == RejectReason.MISSING:
                return None
            raise

    def retried(self, access: Callable[[], T]) -> T:
        """Return what `access` returns; retries with growing pauses while the fault is transient."""
        for attempt in itertools.count():
            try:
                return access()
            except CaptionerError:
                raise
            except Exception as error:  # each fsspec store raises its own kinds; diagnose() keeps type and text
                fault = diagnose(error)
                if attempt == self._num_retries or not fault.is_transient:
                    raise StoreError(fault) from error
            time.sleep(pause_s(attempt, fault.retry_after_s))
        raise AssertionError("unreachable")


def file_or_folder(url: str, size_bytes: int | None, *, is_folder: bool) -> Entry:
    """Return the entry of a file or folder at a URL."""
    return Entry(url.rstrip("/") + "/", None, is_folder=True) if is_folder else Entry(url, size_bytes)


def in_order(entries: list[Entry]) -> list[Entry]:
    """Return entries in the order of a flat listing: a folder sorts by its name and a slash."""
    return sorted(entries, key=lambda entry: entry.url.rstrip("/") + "/" if entry.is_folder else entry.url)
