"""A watch over processes without which a job neither goes on nor ends. Knows signals and threads; no Ray.

Python runs a signal's handler in the main thread and lets it raise: that ends a job wherever it waits.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from captioner.errors import JobError

__all__ = ["vigil"]

_EVERY_S = 1.0


@contextmanager
def vigil(loss: Callable[[], str | None], every_s: float = _EVERY_S) -> Iterator[None]:
    """Raise JobError in the block once `loss` names what is gone, in the main thread; elsewhere watch nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[str] = []
    main = threading.get_ident()
    ended = threading.Event()

    def watch() -> None:
        while not seen and not ended.wait(every_s):
            if found := loss():
                seen.append(found)
                signal.pthread_kill(main, signal.SIGUSR2)  # not to any thread: what the main one waits in must end

    def end(*_: Any) -> None:
        raise JobError(
            f"{seen[0]} is gone, killed by somebody or for want of memory, and no job goes on without it; what was"
            " written stays. The same command continues"
        )

    before = signal.signal(signal.SIGUSR2, end)
    watcher = threading.Thread(target=watch, name="vigil", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        signal.signal(signal.SIGUSR2, before)
