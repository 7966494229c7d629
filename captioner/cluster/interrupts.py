"""How a job ends early: at a signal, or when a process of its own Ray is gone. Knows signals and processes; no Ray.

    stopping               the first Ctrl-C or SIGTERM: nothing more is started; images that were fetched are finished
    watch_ray_processes    the raylet or the GCS server has died: the job ends with an error that says so

A file in the run folder tells the tasks that read, fetch and caption, wherever they run, that the job is to stop.
Python runs a signal handler in the main thread, and an exception that it raises ends whatever that thread waits for.
"""

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from captioner.cluster.watching import watching
from captioner.errors import JobError
from captioner.storage.processes import process_start
from captioner.storage.stop_file import StopFile
from captioner.terminal import counted

__all__ = ["StopRequest", "stopping", "watch_ray_processes"]

log = logging.getLogger("captioner")

_AGAIN_S = 10.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class StopRequest:
    """Whether a signal has asked the job to stop, and which one."""

    signal_number: int = 0

    @property
    def is_made(self) -> bool:
        """Whether the job is to stop."""
        return self.signal_number != 0


@contextmanager
def stopping(
    file: StopFile, is_lost: Callable[[], bool], drain_s: float, num_finished: Callable[[], int] = int
) -> Iterator[StopRequest]:
    """Yield a request that the first signal makes, instead of raising KeyboardInterrupt, and write the stop file.

    A second signal ends the job at once, and so does the first one after `drain_s` seconds. Signals that the process
    ignores or handles itself are left alone. is_lost: says whether another job holds the table; then there is nothing
    to finish, and the first signal raises KeyboardInterrupt. num_finished: images finished so far, for the log.
    """
    request = StopRequest()
    # The signal that came, not always SIGINT: a job started by `nohup ... &` in a script ignores Ctrl-C.
    deadline = threading.Timer(drain_s, lambda: os.kill(os.getpid(), request.signal_number))
    deadline.daemon = True
    handled = [number for number in _SIGNALS if signal.getsignal(number) is signal.default_int_handler]
    is_main = threading.current_thread() is threading.main_thread()

    def restore() -> None:
        for number in handled:
            signal.signal(number, signal.default_int_handler)

    def stop(number: int, _: object) -> None:
        restore()
        if is_lost():
            raise KeyboardInterrupt
        request.signal_number = number
        log.info(
            "stopping: %s finished so far; what is begun is finished and saved, for up to %g s; Ctrl-C again ends at"
            " once",
            counted(num_finished(), "image"),
            drain_s,
        )
        threading.Thread(target=file.write, daemon=True).start()
        deadline.start()

    if is_main:
        for number in handled:
            signal.signal(number, stop)
    try:
        yield request
    finally:
        deadline.cancel()
        if is_main:
            restore()
        if request.is_made:
            file.remove()


@contextmanager
def watch_ray_processes(pids: Mapping[int, str], every_s: float = 1.0) -> Iterator[None]:
    """Raise JobError in the block, wherever it waits, once one of these processes has ended.

    pids: process id -> name for the error. Only the main thread can be interrupted; any other one is not watched for.
    The error is raised again every `_AGAIN_S` seconds until the block ends: what clears up on the way may wait, too.
    """
    if not pids or threading.current_thread() is not threading.main_thread():
        yield
        return
    main = threading.get_ident()
    ended: list[str] = []
    told_at = -math.inf
    is_over = False
    telling = threading.Lock()

    def look() -> None:
        nonlocal told_at
        ended.extend(name for pid, name in pids.items() if name not in ended and process_start(pid) is None)
        with telling:  # a signal that comes when its handler is gone would end this process without a word
            if ended and not is_over and time.monotonic() - told_at > _AGAIN_S:
                told_at = time.monotonic()
                signal.pthread_kill(main, signal.SIGUSR2)  # to that thread: its system call must return

    def end(*_: object) -> None:
        if is_over:
            return
        raise JobError(
            f"{ended[0]} has died, killed or out of memory, and the job cannot run without it; what was written stays."
            " The same command continues"
        )

    before = signal.signal(signal.SIGUSR2, end)
    try:
        with watching(look, every_s=every_s, name="ray processes"):
            try:
                yield
            finally:
                is_over = True
    finally:
        is_over = True  # where the first look has raised, before the block began
        with telling:
            signal.signal(signal.SIGUSR2, before)
