"""A thread that looks at something every so often for as long as a block runs. Knows nothing of what it looks at."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["watching"]

_LAST_LOOK_S = 2.0


@contextmanager
def watching(look: Callable[[], object], *, every_s: float, name: str) -> Iterator[None]:
    """Call `look` in a thread of its own, at once and then every `every_s` seconds, for as long as the block runs.

    The end of the block waits at most `_LAST_LOOK_S` seconds for a look: one that asks a dead cluster may never end."""
    has_ended = threading.Event()

    def watch() -> None:
        look()
        while not has_ended.wait(every_s):
            look()

    thread = threading.Thread(target=watch, name=name, daemon=True)
    try:
        thread.start()  # a look may raise an error here already, by a signal
        yield
    finally:
        has_ended.set()
        if thread.is_alive():
            thread.join(_LAST_LOOK_S)
