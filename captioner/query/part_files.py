"""A file system for DuckDB that holds the parts of a table and no other file, on any store. Nothing can be written.

Local parts are opened as they are. Of a part on another store, each piece that DuckDB reads is one ranged request, with
the retries of the store, and its size comes from the listing, so that no request is needed for it. Knows neither
Parquet nor SQL.
"""

import io
import os
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from fsspec import AbstractFileSystem

from captioner.storage import Entry, Store
from captioner.storage.faults import StoreError, diagnose
from captioner.storage.local_store import LocalStore

__all__ = ["PROTOCOL", "READ_ONLY", "PartFiles"]

T = TypeVar("T")

PROTOCOL = "part"
READ_ONLY = "parts are only read"
"""What the error says that a writer gets."""

_NEVER = datetime(1970, 1, 1)  # without a zone, as DuckDB wants it


class PartFiles(AbstractFileSystem):  # type: ignore[misc]
    """Files by the names `part://captions/...`; any other name is not there."""

    protocol = PROTOCOL
    cachable = False

    def __init__(self, store: Store, entries: Mapping[str, Entry]) -> None:
        """entries: name without protocol -> its entry in the listing; of a local part the size may be missing."""
        super().__init__()
        self._store = store
        self._entries = dict(entries)

    def _entry(self, path: str) -> Entry:
        name = path.removeprefix(f"{PROTOCOL}://")
        if name not in self._entries:
            raise FileNotFoundError(path)
        return self._entries[name]

    def _local_path(self, entry: Entry) -> str:
        """Return the path of a part on the local file system, empty on another store."""
        return self._store.path(entry.url) if isinstance(self._store, LocalStore) else ""

    def open(self, path: str, mode: str = "rb", **_: Any) -> io.RawIOBase:
        """Return a reader of one part. Raises PermissionError for a writer, FileNotFoundError for any other path."""
        if mode != "rb":
            raise PermissionError(READ_ONLY)
        entry = self._entry(path)
        local = self._local_path(entry)
        if not local:
            return _RangedFile(self._store, entry)
        return _LocalFile(_local(lambda: os.open(local, os.O_RDONLY | os.O_CLOEXEC)))

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Return name, size and type; the size of a local part as it is now, of another as the listing had it."""
        entry = self._entry(path)
        local = self._local_path(entry)
        size_bytes = _local(lambda: Path(local).stat().st_size) if local else entry.size_bytes
        return {"name": path, "size": size_bytes, "type": "file"}

    def exists(self, path: str, **_: Any) -> bool:
        """Return True if a part has this name."""
        return path.removeprefix(f"{PROTOCOL}://") in self._entries

    def modified(self, path: str) -> datetime:
        """Return the same time for every part: parts never change."""
        del path
        return _NEVER

    def _refuse(self, *_: Any, **__: Any) -> None:
        """Refuse every access that would change a file."""
        raise PermissionError(READ_ONLY)

    rm = rm_file = rmdir = mv = mkdir = makedirs = touch = _refuse

    def glob(self, path: str, **_: Any) -> list[str]:
        """Return the part of this name; characters of a pattern have no meaning."""
        return [path] if self.exists(path) else []


def _local(access: Callable[[], T]) -> T:
    """Return what `access` to the local file system returns. Raises StoreError."""
    try:
        return access()
    except OSError as error:
        raise StoreError(diagnose(error)) from error


class _File(io.RawIOBase):
    """A file of known size, read piece by piece."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__()
        self._size = size_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._position)
        wanted = left if size is None or size < 0 else min(size, left)
        data = self._read_range(self._position, self._position + wanted) if wanted else b""
        self._position += len(data)
        return data

    def _read_range(self, start: int, stop: int) -> bytes:
        raise NotImplementedError


class _RangedFile(_File):
    """One part on a store that is not local: each piece is one request."""

    def __init__(self, store: Store, entry: Entry) -> None:
        super().__init__(entry.size_bytes or 0)
        self._store = store
        self._url = entry.url

    def _read_range(self, start: int, stop: int) -> bytes:
        return self._store.read_range(self._url, start, stop)


class _LocalFile(_File):
    """One local part. Closed when it is collected: DuckDB closes no file that it reads."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(os.fstat(descriptor).st_size)
        self._descriptor = descriptor

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()

    def _read_range(self, start: int, stop: int) -> bytes:
        return _local(lambda: os.pread(self._descriptor, stop - start, start))
