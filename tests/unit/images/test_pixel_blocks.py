"""Blocks of memory: lent again once nobody holds them, and never before."""

import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa

from captioner.images.pixel_blocks import PixelBlock, PixelBlocks, Places


def lent(blocks: PixelBlocks, num_rows: int = 4, row_bytes: int = 8) -> PixelBlock:
    block = blocks.lend(num_rows, row_bytes)
    assert block
    return block


def address(block: PixelBlock) -> int:
    return int(block.rows.ctypes.data)


def open_files() -> set[tuple[int, int]]:
    """Device and inode of each file that this process has open."""
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one of the listing itself, or of another thread
            status = descriptor.stat()
            found.add((status.st_dev, status.st_ino))
    return found


def test_what_another_process_writes_at_the_offset_of_a_place_is_in_its_row() -> None:
    block = lent(PixelBlocks())
    places = Places(block, [3, 0, 2]).of([2, 0])
    assert places.offsets == [16, 24]
    for offset, value in zip(places.offsets, (b"two", b"three"), strict=True):
        os.pwrite(block.fileno, value, offset)
    assert [pixels.tobytes().rstrip(b"\0") for pixels in places.pixels] == [b"two", b"three"]
    assert not block.rows[:2].any()


def test_a_block_is_lent_again_only_once_no_part_of_it_is_held() -> None:
    blocks = PixelBlocks()
    first = lent(blocks)
    where, row = address(first), first.rows[1]
    table = pa.table({"pixels": pa.Array.from_buffers(pa.binary(8), 4, [None, pa.py_buffer(first.rows)])})
    part = table.slice(2)
    del first, table
    second = lent(blocks)
    assert address(second) != where, "a row and a table show it"
    del row
    third = lent(blocks)
    assert address(third) != where, "a slice of the table shows it"
    del part
    assert address(lent(blocks)) == where


def test_a_smaller_block_takes_the_memory_of_a_larger_one_and_a_larger_one_gets_its_own() -> None:
    blocks = PixelBlocks()
    where = address(lent(blocks, 4))
    assert address(lent(blocks, 3)) == where
    larger = lent(blocks, 5)
    larger.rows[:] = 7
    assert (np.frombuffer(os.pread(larger.fileno, 100, 0), np.uint8) == np.full(40, 7)).all()


def test_whoever_keeps_many_blocks_gets_none_in_the_end_and_files_are_closed_with_the_last_of_them() -> None:
    blocks = PixelBlocks()
    held = [blocks.lend(1, 8) for _ in range(32)]
    assert held[0]
    assert held[-1] is None
    files = {(status.st_dev, status.st_ino) for status in (os.fstat(block.fileno) for block in held if block)}
    assert files <= open_files()
    del blocks
    first = held[0]
    held.clear()
    assert first.rows.sum() == 0, "it outlives its lender"
    del first
    assert not files & open_files()


def test_no_bytes_need_no_block() -> None:
    assert PixelBlocks().lend(0, 8) is None
