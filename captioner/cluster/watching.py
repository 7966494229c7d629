"""A thread that looks at something every so often for as long as a block runs. Knows nothing of what it looks at."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["watching"]


@contextmanager
def watching(look: Callable[[], object], *, every_s: float, name: str) -> Iterator[None]:
    """Call `look` in a thread of its own, at once and then every `every_s` seconds, for as long as the block runs."""
    has_ended = threading.Event()

    def watch() -> None:
        look()
        while not has_ended.wait(every_s):
            look()

    thread = threading.Thread(target=watch, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()
