"""The parts of a table as DuckDB reads them: a file system of these files alone, on any store.

Each piece that DuckDB wants is one ranged read, tried again as everything that reads a store here is. Sizes come from
the listing, so that nothing is asked twice. Knows neither Parquet nor SQL.
"""

import io
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from fsspec import AbstractFileSystem

from captioner.sources.store import Entry, Store

__all__ = ["PROTOCOL", "PartFiles"]

PROTOCOL = "part"
_NEVER = datetime(1970, 1, 1)  # without a zone, as DuckDB wants it


class PartFiles(AbstractFileSystem):  # type: ignore[misc]
    """Files by the names `part://captions/...`; any other name is not there."""

    protocol = PROTOCOL
    cachable = False

    def __init__(self, store: Store, entries: Mapping[str, Entry]) -> None:
        """entries: name without protocol -> what the listing said of it."""
        super().__init__()
        self._store = store
        self._entries = dict(entries)

    def _entry(self, path: str) -> Entry:
        name = path.removeprefix(f"{PROTOCOL}://")
        if name not in self._entries:
            raise FileNotFoundError(path)
        return self._entries[name]

    def open(self, path: str, mode: str = "rb", **_: Any) -> "_RangedFile":
        """Return a reader of one part. Raises FileNotFoundError for what is none."""
        if mode != "rb":
            raise PermissionError(f"{path} can only be read")
        return _RangedFile(self._store, self._entry(path))

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Return name, size and type as the listing had them."""
        return {"name": path, "size": self._entry(path).size_bytes, "type": "file"}

    def exists(self, path: str, **_: Any) -> bool:
        """Say whether a part has this name."""
        return path.removeprefix(f"{PROTOCOL}://") in self._entries

    def modified(self, path: str) -> datetime:
        """Return the same time for every part: one is never changed."""
        del path
        return _NEVER

    def glob(self, path: str, **_: Any) -> list[str]:
        """Return the part of this name; patterns mean themselves."""
        return [path] if self.exists(path) else []


class _RangedFile(io.RawIOBase):
    """One part, read piece by piece."""

    def __init__(self, store: Store, entry: Entry) -> None:
        super().__init__()
        self._store = store
        self._url = entry.url
        self._size = entry.size_bytes or 0
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
        data = self._store.read_range(self._url, self._position, self._position + wanted) if wanted else b""
        self._position += len(data)
        return data
