"""The local file system."""

import contextlib
import ctypes
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from captioner.storage import urls
from captioner.storage.faults import StoreError, diagnose
from captioner.storage.fsspec_store import Entry, Store, file_or_folder, in_order
from captioner.storage.location import Place, full_url
from captioner.storage.temporary_files import temporary_of

__all__ = ["LocalStore"]

_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL})
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of fcntl.h and stdio.h


class LocalStore(Store):
    """The local file system, reached without fsspec."""

    buffer_bytes = 1 << 18

    def path(self, place: Place) -> str:
        """Return the plain path of a place."""
        return urls.local_path(full_url(place))

    def info(self, place: Place) -> Entry | None:
        """As Store.info."""
        found = self._or_none(Path(self.path(place)).stat)
        return found and file_or_folder(full_url(place), found.st_size, is_folder=stat.S_ISDIR(found.st_mode))

    def _identity(self, folder: str) -> object:
        found = self.retried(Path(self.path(folder)).stat)
        return found.st_dev, found.st_ino  # a link to a folder above would be followed for ever

    def _children(self, folder: str) -> list[Entry]:
        return self.retried(lambda: self._scan(self.path(folder)))

    @staticmethod
    def _scan(folder: str) -> list[Entry]:
        with os.scandir(folder) as found:
            return in_order([_local_entry(entry) for entry in found])

    def _reader(self, place: Place) -> Any:
        return Path(self.path(place)).open("rb", buffering=0)

    def read_bytes(self, place: Place) -> bytes:
        """As Store.read_bytes."""
        return self.retried(Path(self.path(place)).read_bytes)

    def write_atomic(self, place: Place, data: bytes, before_write: Callable[[], None] = lambda: None) -> None:
        """As Store.write_atomic: a hidden file in the same folder, flushed to the disk, then renamed."""
        target = Path(self.path(place))
        temporary = temporary_of(target)
        try:
            _write_through(temporary, data)
            before_write()
            temporary.replace(target)
        except OSError as error:
            raise StoreError(diagnose(error)) from error
        finally:
            with contextlib.suppress(OSError):  # where the folder is a file there is nothing to remove
                temporary.unlink()

    def _create_once(self, place: Place, data: bytes) -> bool:
        """As Store.create: write a hidden file, then link it, which fails where the name is taken.

        On a disk without hard links, as some of FUSE and SMB, create the file exclusively and then fill it: one of two
        callers succeeds, and for a moment the file is empty.
        """
        target = Path(self.path(place))
        temporary = temporary_of(target)
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

    def move(self, place: Place, target: Place) -> None:
        """As Store.move; also of folders."""
        path = Path(self.path(target))
        path.parent.mkdir(parents=True, exist_ok=True)
        self.retried(lambda: Path(self.path(place)).rename(path))

    def exchange(self, folder: Place, other: Place) -> bool:
        """As Store.exchange, by Linux's renameat2."""
        rename = getattr(ctypes.CDLL(None), "renameat2", None)
        first, second = (os.fsencode(self.path(place)) for place in (folder, other))
        return rename is not None and rename(_AT_FDCWD, first, _AT_FDCWD, second, _RENAME_EXCHANGE) == 0

    def remove(self, place: Place) -> None:
        """As Store.remove."""
        Path(self.path(place)).unlink(missing_ok=True)


def _create_in_place(target: Path, data: bytes) -> bool:
    try:
        _write_through(target, data, mode="xb")
    except FileExistsError:
        return False
    except OSError:
        target.unlink()  # ours, and incomplete
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
    except OSError:  # a broken link, a loop of links, or removed since: fetching it tells
        return Entry(url, None)
