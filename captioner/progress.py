"""How far a running job is, on stderr: a bar on a terminal, a line a minute elsewhere.

Counts the rows on disk, by the names of the parts, and says what a job waits for; knows nothing of what makes them.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tqdm import tqdm

from captioner.sources.urls import scheme

__all__ = ["progress"]

log = logging.getLogger("captioner")

_LINE_S = 60


@contextmanager
def progress(
    total: int | None, num_written: Callable[[], int], url: str, shortage: Callable[[], str] = str
) -> Iterator[None]:
    """Show on stderr how many rows are on disk: a bar on a terminal, a line a minute elsewhere.

    total: rows that there will be, None where nobody knows. num_written: counts them below `url`. shortage: says what
    the job waits for; empty while it can run.
    """
    finished = threading.Event()
    watch = _Watch(total, num_written, 1 if scheme(url) == "file" else 10, shortage, finished)
    thread = threading.Thread(target=watch.bar if sys.stderr.isatty() else watch.lines, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


@dataclass(frozen=True)
class _Watch:
    """What is looked at, how often, and when to stop."""

    total: int | None
    num_written: Callable[[], int]
    pause_s: float
    shortage: Callable[[], str]
    finished: threading.Event

    def bar(self) -> None:
        with tqdm(total=self.total, unit="image", smoothing=0.1, file=sys.stderr) as bar:
            while not self.finished.wait(self.pause_s):
                bar.set_postfix_str(self.shortage(), refresh=False)
                bar.update(self.num_written() - bar.n)
            bar.update(self.num_written() - bar.n)

    def lines(self) -> None:
        start = time.monotonic()
        if missing := self.shortage():
            log.info(missing)
        while not self.finished.wait(_LINE_S):
            if missing := self.shortage():
                log.info(missing)
                continue
            written, seconds = self.num_written(), time.monotonic() - start
            left = "unknown" if self.total is None else str(self.total - written)
            log.info("written=%d left=%s images_per_s=%.1f", written, left, written / seconds)
