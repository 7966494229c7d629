"""How far a running job is, on stderr: a bar on a terminal, a line a minute elsewhere.

Counts the rows on disk, by the names of the parts; knows nothing of what makes them.
"""

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tqdm import tqdm

from captioner.sources.urls import scheme

if TYPE_CHECKING:
    from captioner.plan import Plan  # not at run time: it brings the model room, and tasks import this

__all__ = ["progress"]

log = logging.getLogger("captioner")


@contextmanager
def progress(plan: "Plan", run_id: str) -> Iterator[None]:
    """Show on stderr how many rows are on disk: a bar on a terminal, a line a minute elsewhere."""
    finished = threading.Event()
    show = _bar if sys.stderr.isatty() else _lines
    thread = threading.Thread(target=show, args=(plan, run_id, finished), daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def _bar(plan: "Plan", run_id: str, finished: threading.Event) -> None:
    is_local = scheme(plan.table.url) == "file"
    with tqdm(total=plan.num_left, unit="image", smoothing=0.1, file=sys.stderr) as bar:
        while not finished.wait(1 if is_local else 10):
            bar.update(plan.table.num_written(run_id) - bar.n)
        bar.update(plan.table.num_written(run_id) - bar.n)


def _lines(plan: "Plan", run_id: str, finished: threading.Event) -> None:
    start = time.monotonic()
    while not finished.wait(60):
        written, seconds = plan.table.num_written(run_id), time.monotonic() - start
        log.info("written=%d left=%s images_per_s=%.1f", written, _left(plan, written), written / seconds)


def _left(plan: "Plan", written: int) -> str:
    return "unknown" if plan.num_left is None else str(plan.num_left - written)
