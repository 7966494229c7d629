"""A process that dies at any change of a disk or store: it does nothing more, as after SIGKILL."""

import itertools
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from captioner.storage import local_store
from captioner.storage.local_store import LocalStore
from captioner.tables import lease_file

__all__ = ["Crash", "CrashedError", "Moment", "crashing", "empty_memory"]

Moment = Literal["before", "half", "after"]
"""Where in a change the process dies; `half`: a file is there with half of its bytes."""

_processes = itertools.count(1)
_STORE = ("pipe_file", "put_file", "cp_file", "rm_file", "cat_ranges")
"""Changes of a store; the last one fetches what a copy in the cache grows by."""


class CrashedError(BaseException):
    """The process has died: nothing may catch it."""


@dataclass
class Crash:
    """Dies at the n-th change."""

    at: int | None
    """None: it lives, and counts."""

    moment: Moment = "before"
    num_changes: int = 0
    is_dead: bool = False
    halves: set[int] = field(default_factory=set)
    """The changes that write a file of this machine: only these have a `half` that is not `before`."""

    _lock: Lock = field(default_factory=Lock)  # files are moved by several threads

    def change(self, do: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        """Do a change, or die at it. half: leaves half of the file that the change writes."""
        with self._lock:
            self.num_changes += 1
            if half:
                self.halves.add(self.num_changes)
            if self.is_dead:
                raise CrashedError
            if self.num_changes != self.at:
                return do()
            self.is_dead = True
            if self.moment == "half" and half:
                half()
            elif self.moment == "after":
                do()
            raise CrashedError

    def deaths(self, chance: random.Random) -> list[tuple[int, Moment]]:
        """Return (n, moment) for each state in which a death leaves the files that this process changed.

        What it leaves after one change is what it leaves before the next, so chance takes one of the two."""
        found: list[tuple[int, Moment]] = [(1, "before")]
        for at in range(1, self.num_changes + 1):
            if at in self.halves:
                found.append((at, "half"))
            is_last = at == self.num_changes
            found.append((at, "after") if is_last or chance.random() < 0.5 else (at + 1, "before"))
        return found


@contextmanager
def crashing(at: int | None, moment: Moment = "before") -> Iterator[Crash]:
    """Run the block as another process of this machine, which dies at the n-th change."""
    crash, process = Crash(at, moment), f"process {next(_processes)}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease_file, "process_start", lambda _: process)
        patch.setattr(os, "fsync", lambda _: None)
        _patch_disk(patch, crash)
        _patch_store(patch, crash)
        try:
            yield crash
        except CrashedError:
            assert crash.is_dead


def empty_memory(folder: Path) -> None:
    """Remove what is below memory://FOLDER: each listing of the memory looks at every file in it."""
    store = MemoryFileSystem()
    if store.exists(str(folder)):
        store.rm(str(folder), recursive=True)


def _patch_disk(patch: pytest.MonkeyPatch, crash: Crash) -> None:
    write, exchange = local_store._write_through, LocalStore.exchange

    def write_or_die(path: Path, data: bytes, mode: Any = "wb") -> None:
        crash.change(lambda: write(path, data, mode), lambda: write(path, data[: len(data) // 2], mode))

    patch.setattr(local_store, "_write_through", write_or_die)
    patch.setattr(LocalStore, "exchange", _wrapped(exchange, crash))
    for name in ("replace", "rename", "unlink", "hardlink_to"):
        patch.setattr(Path, name, _wrapped(getattr(Path, name), crash))


def _patch_store(patch: pytest.MonkeyPatch, crash: Crash) -> None:
    """A store knows no half: an upload is there when it is complete."""
    for name in _STORE:
        patch.setattr(MemoryFileSystem, name, _wrapped(getattr(MemoryFileSystem, name), crash))


def _wrapped(method: Callable[..., Any], crash: Crash) -> Callable[..., Any]:
    def changed(*arguments: Any, **options: Any) -> Any:
        return crash.change(lambda: method(*arguments, **options))

    return changed
