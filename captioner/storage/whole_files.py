"""Write a file of any size whole or not at all, from a function that writes it piece by piece."""

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, TypeVar

from captioner.storage.faults import StoreError, diagnose
from captioner.storage.fsspec_store import Store
from captioner.storage.local_store import LocalStore
from captioner.storage.location import Place
from captioner.storage.temporary_files import temporary_of

__all__ = ["write_whole"]

T = TypeVar("T")


def write_whole(store: Store, place: Place, write: Callable[[IO[bytes]], T]) -> T:
    """Make `place` hold what `write` writes to the file it is given, or leave it as it was; return what it returns.

    Memory holds no more than `write` does. Elsewhere than on the local file system, the file is first written to a
    temporary one here. Raises StoreError."""
    if isinstance(store, LocalStore):
        return _write_local(Path(store.path(place)), write)
    with tempfile.NamedTemporaryFile() as file:
        result = write(file)
        file.flush()
        store.upload(place, file.name)
    return result


def _write_local(path: Path, write: Callable[[IO[bytes]], T]) -> T:
    temporary = temporary_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w+b") as file:
            result = write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(diagnose(error)) from error
    finally:
        with contextlib.suppress(OSError):  # where the folder is a file, say, there is nothing to remove
            temporary.unlink()
    return result
