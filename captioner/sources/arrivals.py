"""What many coroutines bring and one thread takes away: in the order in which it comes, and never much of it at once.

Knows sizes; neither stores nor images.
"""

import asyncio
import queue
from collections.abc import Iterator

from captioner.rows import Reject

__all__ = ["Arrival", "Arrivals"]

Arrival = tuple[int, bytes | Reject]
"""Place in the order of asking, and what came."""

_MOST_AT_ONCE = 64


class Arrivals:
    """A queue from an event loop to a thread. Who is about to fetch more waits for `room` first."""

    def __init__(self, loop: asyncio.AbstractEventLoop, most_bytes: int) -> None:
        self._loop = loop
        self._most_bytes = most_bytes
        self._held_bytes = 0
        self._room = asyncio.Event()
        self._room.set()
        self._queue: queue.SimpleQueue[Arrival | None] = queue.SimpleQueue()

    async def room(self) -> None:
        """Wait until less than the limit is held."""
        await self._room.wait()

    def put(self, place: int, found: bytes | Reject) -> None:
        """Add one arrival; called in the loop."""
        self._count(_size(found))
        self._queue.put((place, found))

    def end(self) -> None:
        """Let the thread know that nothing more will come."""
        self._queue.put(None)

    def __iter__(self) -> Iterator[list[Arrival]]:
        """Yield what has come, waiting for the first; the memory counts as held until the next is asked for."""
        while True:
            taken = [self._queue.get()]
            while len(taken) < _MOST_AT_ONCE and not self._queue.empty():
                taken.append(self._queue.get())
            found = [arrival for arrival in taken if arrival is not None]
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
