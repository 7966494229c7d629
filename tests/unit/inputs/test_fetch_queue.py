"""What many coroutines bring and one thread takes away, never much at once."""

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from captioner.inputs.fetch_queue import FetchQueue
from captioner.schema import Reject, RejectReason


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_nobody_fetches_more_while_as_much_is_held_as_may_be(loop: asyncio.AbstractEventLoop) -> None:
    queue = FetchQueue(loop, most_bytes=10)
    waiting = []

    async def bring() -> None:
        for place in range(4):
            await queue.room()
            waiting.append(place)
            queue.put(place, b"123456")
        queue.put(4, Reject(RejectReason.MISSING, "gone"))
        queue.close()

    future = asyncio.run_coroutine_threadsafe(bring(), loop)
    while len(waiting) < 2:
        time.sleep(0.01)
    batches = iter(queue)
    taken = [place for place, _ in next(batches)]
    assert (taken, waiting) == ([0, 1], [0, 1]), "what was given out is held until more is asked for"
    taken += [place for found in batches for place, _ in found]
    future.result()
    assert taken == [0, 1, 2, 3, 4]
