"""A queue from many coroutines to one thread, bounded by the bytes that it holds.

Knows sizes; neither stores nor images.
"""

import asyncio
import queue
from collections.abc import Iterator

from captioner.schema import Reject

__all__ = ["FetchQueue", "Fetched"]

Fetched = tuple[int, bytes | Reject]
"""Index in the request, and the bytes or why there are none."""

_MOST_AT_ONCE = 64


class FetchQueue:
    """A queue from an event loop to a thread. A coroutine waits for `room` before it fetches more."""

    def __init__(self, loop: asyncio.AbstractEventLoop, most_bytes: int) -> None:
        self._loop = loop
        self._most_bytes = most_bytes
        self._held_bytes = 0
        self._room = asyncio.Event()
        self._room.set()
        self._queue: queue.SimpleQueue[Fetched | None] = queue.SimpleQueue()

    async def room(self) -> None:
        """Wait until the queue holds less than its limit."""
        await self._room.wait()

    def put(self, index: int, found: bytes | Reject) -> None:
        """Add what was fetched; called in the loop."""
        self._count(_size(found))
        self._queue.put((index, found))

    def close(self) -> None:
        """Tell the thread that nothing more will come."""
        self._queue.put(None)

    def __iter__(self) -> Iterator[list[Fetched]]:
        """Yield what has arrived, at least one. Its bytes count as held until the next batch is asked for."""
        while True:
            taken = [self._queue.get()]
            while len(taken) < _MOST_AT_ONCE and not self._queue.empty():
                taken.append(self._queue.get())
            found = [fetched for fetched in taken if fetched is not None]
            if found:
                yield found
            if None in taken:
                return
            self._loop.call_soon_threadsafe(self._count, -sum(_size(source) for _, source in found))

    def _count(self, num_bytes: int) -> None:
        self._held_bytes += num_bytes
        if self._held_bytes < self._most_bytes:
            self._room.set()
        else:
            self._room.clear()


def _size(found: bytes | Reject) -> int:
    return 0 if isinstance(found, Reject) else len(found)
