"""Progress of a running fit on stderr: a bar on a terminal, else a line every few seconds; on request in TensorBoard.

Knows rows of metrics.jsonl only.
"""

import logging
import sys
import time
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from captioner.training.fit.row import Row

__all__ = ["FitProgress"]

log = logging.getLogger("captioner")

_LINE_EVERY_S = 15.0


class FitProgress:
    """Shows rows as they come. A context manager."""

    def __init__(self, num_steps: int, tensorboard_folder: str | None = None) -> None:
        self._num_steps = num_steps
        self._bar = tqdm(total=num_steps, unit="step", file=sys.stderr) if sys.stderr.isatty() else None
        self._events = _writer(tensorboard_folder) if tensorboard_folder else None
        self._first: tuple[float, float] | None = None
        self._shown_at = -_LINE_EVERY_S

    def show(self, row: Row) -> None:
        """Show a row. After the loss of a worker a row may come again: it replaces the earlier one."""
        now = time.monotonic()
        self._first = self._first or (row["step"], now)
        if self._events:
            for name, value in row.items():
                self._events.add_scalar(name, value, int(row["step"]))
        if self._bar is not None:
            self._bar.n = int(row["step"])
            self._bar.set_postfix_str(_figures(row))
        elif "val_loss" in row or now - self._shown_at >= _LINE_EVERY_S or row["step"] == self._num_steps:
            self._shown_at = now
            log.info("step=%d of=%d %s eta_s=%s", row["step"], self._num_steps, _figures(row), self._eta_s(row, now))

    def _eta_s(self, row: Row, now: float) -> str:
        """Return the seconds left at the rate since the first row, evaluations included."""
        assert self._first is not None
        step, start = self._first
        if row["step"] <= step:
            return "unknown"
        return f"{(self._num_steps - row['step']) * (now - start) / (row['step'] - step):.0f}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._events:
            self._events.close()


def _figures(row: Row) -> str:
    names = {"loss": ".4f", "val_loss": ".4f", "cider_d": ".3f", "bleu_4": ".3f", "tokens_per_s": ",.0f"}
    return " ".join(f"{name}={row[name]:{form}}" for name, form in names.items() if name in row)


def _writer(folder: str) -> Any:
    from tensorboardX import SummaryWriter  # comes with ray[train]; here, not above: it is slow to import

    return SummaryWriter(folder)
