"""The first Ctrl-C or SIGTERM of a job: nothing more is begun, and what was is captioned and written.

A file in the run folder tells those who read, fetch and caption, wherever they run. The second signal ends the job at
once, and so does the first after DRAIN_S. Knows signals and one file; no Ray.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from captioner.sources import StoreError, join, open_store

__all__ = ["DRAIN_S", "Stop", "StopFile", "stopping"]

log = logging.getLogger("captioner")

DRAIN_S = 20.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class StopFile:
    """What stands in the run folder from the first signal to the end of a run."""

    run_folder: str
    run_id: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Where it stands."""
        return join(self.run_folder, "stopping", self.run_id)

    def is_there(self) -> bool:
        """Say whether the run is to read nothing more; a store that does not answer says no."""
        with suppress(StoreError):
            open_store(self.url, self.options).read_bytes(self.url)  # one request; to ask what stands there takes three
            return True
        return False

    def write(self) -> None:
        """Tell the tasks. Raises StoreError."""
        open_store(self.url, self.options).write_atomic(self.url, b"")

    def remove(self) -> None:
        """Leave nothing behind, if the store lets us."""
        with suppress(StoreError):
            open_store(self.url, self.options).remove(self.url)


@dataclass
class Stop:
    """Whether a signal came, and which."""

    number: int = 0

    @property
    def is_asked(self) -> bool:
        """Whether the job is to end."""
        return self.number != 0


@contextmanager
def stopping(file: StopFile, is_lost: Callable[[], bool]) -> Iterator[Stop]:
    """Let the first signal end the block early instead of raising KeyboardInterrupt; yield whether one came.

    Signals that somebody else handles, or that are ignored, stay so. is_lost: says whether another job has the table,
    so that there is nothing to finish.
    """
    stop = Stop()
    # by the signal that came: the other one may be ignored, as Ctrl-C is behind `nohup ... &`
    deadline = threading.Timer(DRAIN_S, lambda: os.kill(os.getpid(), stop.number))
    deadline.daemon = True
    taken = [number for number in _SIGNALS if signal.getsignal(number) is signal.default_int_handler]

    def give_back() -> None:
        for number in taken:
            signal.signal(number, signal.default_int_handler)

    def ask(number: int, _: object) -> None:
        give_back()
        if is_lost():
            raise KeyboardInterrupt
        stop.number = number
        log.info("ending=after_what_is_begun for_s=%g reason=%s", DRAIN_S, "a signal; another one ends it at once")
        threading.Thread(target=file.write, daemon=True).start()
        deadline.start()

    if threading.current_thread() is threading.main_thread():
        for number in taken:
            signal.signal(number, ask)
    try:
        yield stop
    finally:
        deadline.cancel()
        if threading.current_thread() is threading.main_thread():
            give_back()
        if stop.is_asked:
            file.remove()
