"""The run folder of a fit while it runs: checkpoint.pt to resume from, metrics.jsonl and curves.svg to look at."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from captioner.training.fit.curves import curves_svg
from captioner.training.fit.fit_loop import Listener
from captioner.training.fit.fit_output import FitOutput
from captioner.training.fit.fit_state import FitState
from captioner.training.fit.projector import ProjectorFit
from captioner.training.fit.row import Row

__all__ = ["RunFolderWriter"]

_METRICS_S = 5.0  # seconds between two writes of metrics.jsonl: a store takes the file as a whole
_GROWTH = 1.05  # and what it has grown by, so that all writes of a long fit are 21 times the file at most


@dataclass
class RunFolderWriter:
    """Writes checkpoints and metrics of a fit, and passes on each row."""

    output: FitOutput
    on_row: Callable[[Row], None]
    clock: Callable[[], float] = monotonic
    _written_at: float = -math.inf
    _num_written: int = 0
    _num_drawn: int = -1

    @property
    def listener(self) -> Listener:
        """What the fit calls."""
        return Listener(on_row=self.write_row, on_checkpoint=self.write_checkpoint)

    def write_row(self, state: FitState) -> None:
        """Pass on the last row. Write metrics.jsonl if that was not just done, and the curves after an evaluation."""
        row = state.history[-1]
        self.on_row(row)
        is_due = self.clock() - self._written_at >= _METRICS_S
        if is_due and len(state.history) >= _GROWTH * self._num_written:
            self._write_metrics(state)
        if "val_loss" in row:
            self._write_curves(state)

    def write_checkpoint(self, state: FitState, fit: ProjectorFit) -> None:
        """Write a state to resume from, after the metrics and curves that go with it."""
        self._write_metrics(state)
        self._write_curves(state)
        self.output.write("checkpoint.pt", state.to_bytes(fit))

    def _write_metrics(self, state: FitState) -> None:
        lines = "".join(json.dumps(row) + "\n" for row in state.history)
        self.output.write("metrics.jsonl", lines.encode())
        self._written_at, self._num_written = self.clock(), len(state.history)

    def _write_curves(self, state: FitState) -> None:
        if len(state.history) == self._num_drawn:
            return
        self._num_drawn = len(state.history)
        self.output.write("curves.svg", curves_svg(state.history, f"Fit of {self.output.name}").encode())
