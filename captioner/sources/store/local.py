"""The local file system."""

import contextlib
import ctypes
import errno
import os
import stat
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from captioner.sources import urls
from captioner.sources.faults import StoreError, diagnose
from captioner.sources.store.fsspec_store import Entry, Store, file_or_folder, in_order

__all__ = ["LocalStore"]

_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL})
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of fcntl.h and stdio.h


class LocalStore(Store):
    """The local file system, without fsspec between."""

    def path(self, url: str) -> str:
        """Return the plain path of `url`."""
        return urls.local_path(url)

    def info(self, url: str) -> Entry | None:
        """As Store.info."""
        found = self._or_none(Path(self.path(url)).stat)
        return found and file_or_folder(url, found.st_size, is_folder=stat.S_ISDIR(found.st_mode))

    def _identity(self, folder: str) -> object:
        found = self._steady(Path(self.path(folder)).stat)
        return found.st_dev, found.st_ino  # a link to a folder above would never end

    def _children(self, folder: str) -> list[Entry]:
        return self._steady(lambda: self._scan(self.path(folder)))

    @staticmethod
    def _scan(folder: str) -> list[Entry]:
        with os.scandir(folder) as found:
            return in_order([_local_entry(entry) for entry in found])

    def _reader(self, url: str) -> Any:
        return Path(self.path(url)).open("rb", buffering=0)

    def read_bytes(self, url: str) -> bytes:
        """As Store.read_bytes."""
        return self._steady(Path(self.path(url)).read_bytes)

    def write_atomic(self, url: str, data: bytes, check: Callable[[], None] = lambda: None) -> None:
        """As Store.write_atomic: a hidden file in the same folder, flushed to the disk, then renamed."""
        target = Path(self.path(url))
        temporary = target.with_name(f".{target.name[:100]}.{uuid.uuid4().hex}.tmp")
        try:
            _write_through(temporary, data)
            check()
            temporary.replace(target)
        except OSError as error:
            raise StoreError(diagnose(error)) from error
        finally:
            with contextlib.suppress(OSError):  # where the folder is a file, say, there is nothing to remove
                temporary.unlink()

    def _create_once(self, url: str, data: bytes) -> bool:
        """As Store.create: a whole file under a hidden name, then linked, which fails where the name is taken.

        Where a disk has no hard links, as some of FUSE and SMB, the file is made under its name and filled then: of two
        that make it one does, and for a moment it is empty.
        """
        target = Path(self.path(url))
        temporary = target.with_name(f".{target.name[:100]}.{uuid.uuid4().hex}.tmp")
        try:
            _write_through(temporary, data)
            target.hardlink_to(temporary)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return _create_in_place(target, data)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        return True

    def move(self, url: str, target: str) -> None:
        """As Store.move; also of folders."""
        path = Path(self.path(target))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._steady(lambda: Path(self.path(url)).rename(path))

    def exchange(self, folder: str, other: str) -> bool:
        """As Store.exchange, by the renameat2 of Linux."""
        rename = getattr(ctypes.CDLL(None), "renameat2", None)
        first, second = (os.fsencode(self.path(url)) for url in (folder, other))
        return rename is not None and rename(_AT_FDCWD, first, _AT_FDCWD, second, _RENAME_EXCHANGE) == 0

    def remove(self, url: str) -> None:
        """As Store.remove."""
        Path(self.path(url)).unlink(missing_ok=True)


def _create_in_place(target: Path, data: bytes) -> bool:
    try:
        _write_through(target, data, mode="xb")
    except FileExistsError:
        return False
    except OSError:
        target.unlink()  # ours, and not whole
        raise
    return True


def _write_through(path: Path, data: bytes, mode: Literal["wb", "xb"] = "wb") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open(mode) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _local_entry(entry: os.DirEntry[str]) -> Entry:
    url = urls.local_url(entry.path)
    try:
        return Entry(url, None, is_folder=True) if entry.is_dir() else Entry(url, entry.stat().st_size)
    except OSError:  # a broken link, a ring of links, or gone since: fetching it will say so
        return Entry(url, None)
