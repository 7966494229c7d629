"""A file on a store that throttles, resets connections and times out."""

import io
from collections.abc import Callable
from typing import Any

__all__ = ["SteadyFile"]


class SteadyFile(io.RawIOBase):
    """A reader that reopens the file and continues where it was when the store drops the connection."""

    def __init__(self, reopen: Callable[[], Any], retried: Callable[[Callable[[], Any]], Any]) -> None:
        super().__init__()
        self._reopen = reopen
        self._retried = retried
        self._position = 0
        self._file = retried(reopen)
        self.size_bytes: int = self._size()

    def _size(self) -> int:
        size = self._file.seek(0, io.SEEK_END)
        self._file.seek(0)
        return int(size)

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move within the file, and no further; return the position."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size_bytes}[whence]
        self._position = min(max(0, base + offset), self.size_bytes)  # a caller that skips past the end sees it
        return self._position

    def readinto(self, buffer: Any) -> int:
        """As RawIOBase.readinto."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int | None = -1) -> bytes:
        """Return exactly `size` bytes, or all that are left. Raises StoreError."""
        left = max(0, self.size_bytes - self._position)
        wanted = left if size is None or size < 0 else min(size, left)
        data = self._retried(lambda: self._read_once(wanted)) if wanted else b""
        self._position += len(data)
        return bytes(data)

    def _read_once(self, wanted: int) -> bytes:
        if self._file is None:
            self._file = self._reopen()
        file, self._file = self._file, None  # stays None, and so is reopened, if the next lines raise
        file.seek(self._position)
        data = file.read(wanted)
        if len(data) < wanted:
            raise EOFError(f"{len(data)} of {wanted} bytes at {self._position}")
        self._file = file
        return bytes(data)

    def close(self) -> None:
        """As RawIOBase.close."""
        if not self.closed and self._file is not None:
            self._file.close()
        super().close()
