"""Memory that decode children write pixels into and their parent reads them from: one copy of each pixel less.

A block is an in-memory file that the parent has mapped. It is lent as an array, and again when nobody holds that array
or a part of it any more: its pages are there already, where new memory would cost a page fault for each 4 KiB.
"""

import mmap
import os
import tempfile
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

import numpy as np

from captioner.images.reader import Pixels

__all__ = ["PixelBlock", "PixelBlocks", "Places", "memory_file"]

_MOST_BLOCKS = 16  # of one lender, and so twice as many open files: a decode worker of a job needs two or three


@dataclass(frozen=True)
class PixelBlock:
    """Rows that a child process can write into."""

    rows: Pixels = field(repr=False)
    """uint8[N, bytes of a row]. Whoever holds it, or a part of it, keeps the block from being lent again."""

    fileno: int
    """The file that holds the rows one after another, while `rows` is held."""


class Places(NamedTuple):
    """The rows of a block that the pixels of images become, one for each image, in their order."""

    block: PixelBlock
    indices: Sequence[int]

    def of(self, images: Sequence[int]) -> "Places":
        """Return the places of some of the images."""
        return Places(self.block, [self.indices[image] for image in images])

    @property
    def offsets(self) -> list[int]:
        """Where each place begins in the file, in bytes."""
        row_bytes = self.block.rows.shape[1]
        return [index * row_bytes for index in self.indices]

    @property
    def pixels(self) -> list[Pixels]:
        """The place of each image, uint8[bytes of a row]."""
        return [self.block.rows[index] for index in self.indices]


class PixelBlocks:
    """Lends blocks. Safe to call from many threads."""

    def __init__(self) -> None:
        self._free: deque[_Memory | None] = deque([None] * _MOST_BLOCKS)  # taken from the end: what was used last

    def lend(self, num_rows: int, row_bytes: int) -> PixelBlock | None:
        """Return a block whose rows hold anything; None for no bytes, or while as many as one lender has are held."""
        num_bytes = num_rows * row_bytes
        if not num_bytes:
            return None
        try:
            memory = self._free.pop()
        except IndexError:
            return None
        if memory is None or len(memory.mapped) < num_bytes:
            memory = _Memory(num_bytes)
        rows = np.ndarray((num_rows, row_bytes), np.uint8, buffer=memory.mapped)
        weakref.finalize(rows, self._free.append, memory).atexit = False
        return PixelBlock(rows, memory.fileno)


class _Memory:
    """A file in memory and its mapping, until both are collected."""

    def __init__(self, num_bytes: int) -> None:
        with memory_file() as file:
            os.ftruncate(file.fileno(), num_bytes)
            self.mapped = mmap.mmap(file.fileno(), num_bytes)
            self.fileno = os.dup(file.fileno())
        weakref.finalize(self, os.close, self.fileno).atexit = False


def memory_file() -> BinaryIO:
    """Return an empty file in memory, or where the system has none, one that is deleted when it is closed."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("images"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)
