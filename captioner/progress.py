"""How far a running job is, on stderr: a bar on a terminal, a line a minute elsewhere.

Counts the rows on disk, by the names of the parts, and says what a job waits for; knows nothing of what makes them.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tqdm import tqdm

from captioner.sources.urls import scheme

if TYPE_CHECKING:
    from captioner.plan import Plan  # not at run time: it brings the model room, and tasks import this

__all__ = ["progress"]

log = logging.getLogger("captioner")


_FIRST_LINE_S = 10
_LINE_S = 60


@contextmanager
def progress(plan: "Plan", run_id: str, shortage: Callable[[], str] = str) -> Iterator[None]:
    """Show on stderr how many rows are on disk: a bar on a terminal, a line a minute elsewhere.

    shortage: says what the job waits for; empty while it can run.
    """
    finished = threading.Event()
    show = _bar if sys.stderr.isatty() else _lines
    thread = threading.Thread(target=show, args=(plan, run_id, shortage, finished), daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def _bar(plan: "Plan", run_id: str, shortage: Callable[[], str], finished: threading.Event) -> None:
    is_local = scheme(plan.table.url) == "file"
    with tqdm(total=plan.num_left, unit="image", smoothing=0.1, file=sys.stderr) as bar:
        while not finished.wait(1 if is_local else 10):
            bar.set_postfix_str(shortage(), refresh=False)
            bar.update(plan.table.num_written(run_id) - bar.n)
        bar.update(plan.table.num_written(run_id) - bar.n)


def _lines(plan: "Plan", run_id: str, shortage: Callable[[], str], finished: threading.Event) -> None:
    start = time.monotonic()
    pause_s = _FIRST_LINE_S
    while not finished.wait(pause_s):
        pause_s = _LINE_S
        if missing := shortage():
            log.info(missing)
            continue
        written, seconds = plan.table.num_written(run_id), time.monotonic() - start
        log.info("written=%d left=%s images_per_s=%.1f", written, _left(plan, written), written / seconds)


def _left(plan: "Plan", written: int) -> str:
    return "unknown" if plan.num_left is None else str(plan.num_left - written)
