"""How far a running job is, on stderr: a bar on a terminal, a line a minute elsewhere.

Says at once what the job is doing or waiting for whenever that changes, then how many images the model has finished.
Knows neither Ray nor what counts them.
"""

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from captioner.cluster.watching import watching

__all__ = ["Progress", "progress"]

log = logging.getLogger("captioner")

_BAR = "{l_bar}{bar}| {counted} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Progress:
    """What is shown of a job: its phase, and once images come how many there are."""

    def __init__(self, total: int | None, num_done: int) -> None:
        self.total = total
        """Images of this run; None if unknown."""

        self.num_done = num_done
        """Images that earlier runs finished."""

        self.phase = ""
        """What the job does while no image comes, such as `loading the model`."""

        self._num_finished: Callable[[], int] = int
        self._waits_for: Callable[[], str] = str
        self._last = 0

    @property
    def last_seen(self) -> int:
        """Images of this run that were finished when last looked at."""
        return self._last

    @contextmanager
    def counting(self, num_finished: Callable[[], int], waits_for: Callable[[], str] = str) -> Iterator[None]:
        """Show, for as long as the block runs, how many images are finished, or what the job waits for: empty if for
        nothing."""
        self._num_finished, self._waits_for = num_finished, waits_for
        try:
            yield
        finally:
            self._num_finished, self._waits_for = int, str

    def finish(self, num_images: int) -> None:
        """Show this number of images at the end, in place of the count: an image whose worker died counts twice."""
        self._last = num_images

    def read(self) -> tuple[int, str]:
        """Return how many images of this run are finished, and what the job does or waits for; empty while they
        come: then nobody is asked."""
        before, self._last = self._last, max(self._last, self._num_finished())
        if self.total is not None:
            self._last = min(self._last, self.total)
        if self._last > before:
            return self._last, ""
        return self._last, self._waits_for() or ("" if self._last else self.phase)


def progress(
    total: int | None,
    *,
    num_done: int = 0,
    line_s: float = 60,
    look_s: float = 1.0,
    bar: bool | None = None,
) -> AbstractContextManager[Progress]:
    """Show on stderr how far a job is: a bar on a terminal; elsewhere a line whenever the job does or waits for
    something else, and one every `line_s` seconds.

    total: images of this run, None if unknown. num_done: images of earlier runs, which are shown as done. look_s: how
    often the job is looked at. bar: whether to draw a bar, by default on a terminal.
    """
    shown = Progress(total, num_done)
    return _bar(shown, look_s) if (sys.stderr.isatty() if bar is None else bar) else _lines(shown, line_s, look_s)


class _Bar(tqdm):  # type: ignore[type-arg]
    """A bar that writes 1,024/5,000, and whose rate begins with the first image: Ray's start tells nothing of it."""

    began_at: float | None = None
    """Time of the clock `monotonic` when images began to come; None until then."""

    @property
    def format_dict(self) -> dict[str, Any]:
        """What the parts of the bar are filled with."""
        known = dict(super().format_dict)
        total = "" if self.total is None else f"/{self.total:,}"
        seconds = 0.0 if self.began_at is None else time.monotonic() - self.began_at
        rate = (self.n - self.initial) / seconds if seconds else None
        return known | {"counted": f"{self.n:,}{total}", "rate": rate}


@contextmanager
def _bar(shown: Progress, look_s: float) -> Iterator[Progress]:
    total = None if shown.total is None else shown.total + shown.num_done
    with (
        _Bar(total=total, initial=shown.num_done, unit="image", file=sys.stderr, bar_format=_BAR) as bar,
        logging_redirect_tqdm(tqdm_class=_Bar),  # a line of the log goes above the bar
    ):

        def show() -> None:
            finished, says = shown.read()
            if finished and bar.began_at is None:
                bar.began_at = time.monotonic() - look_s  # they came since the look before
            bar.set_postfix_str(says, refresh=False)
            bar.n = shown.num_done + finished
            bar.refresh()

        with watching(show, every_s=look_s, name="progress"):
            yield shown
        show()


@contextmanager
def _lines(shown: Progress, line_s: float, look_s: float) -> Iterator[Progress]:
    lines = _Lines(shown, line_s, look_s)
    with watching(lines.look, every_s=look_s, name="progress"):
        yield shown


class _Lines:
    """Lines of the log: one whenever the job does something else, and one every so often."""

    def __init__(self, shown: Progress, line_s: float, look_s: float) -> None:
        self._shown, self._line_s, self._look_s = shown, line_s, look_s
        self._says = ""
        self._said_at = -math.inf
        self._began_at: float | None = None
        """When images began to come; None until then."""

    def look(self) -> None:
        """Write a line if one is due."""
        now = time.monotonic()
        finished, says = self._shown.read()
        if finished and self._began_at is None:
            self._began_at = now - self._look_s  # they came since the look before
        is_new = bool(says) and says != self._says
        if not is_new and now - self._said_at < self._line_s:
            return
        self._says, self._said_at = says, now
        if says:
            log.info(says)
        if self._began_at is not None:
            log.info(_figures(self._shown, finished, now - self._began_at))


def _figures(shown: Progress, finished: int, seconds: float) -> str:
    rate = finished / seconds if seconds else 0.0
    if shown.total is None:
        return f"finished={shown.num_done + finished} left=unknown images_per_s={rate:.1f}"
    left = shown.total - finished
    eta = f" eta_s={left / rate:.0f}" if rate else ""
    return f"finished={shown.num_done + finished} left={left} images_per_s={rate:.1f}{eta}"
