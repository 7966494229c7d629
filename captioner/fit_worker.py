"""What one worker of a fit does, without Ray: load, go on from the checkpoint, take every step, keep checkpoints.

Every worker computes; only the first one writes.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any

import torch

from captioner.caption_tokens import CaptionTokens
from captioner.config import TrainingConfig
from captioner.examples import FeatureSet
from captioner.fitting.curves import curves_svg
from captioner.fitting.loop import Listener, fit_projector
from captioner.fitting.output import FitOutput
from captioner.fitting.projector import ProjectorFit
from captioner.fitting.state import FitState, Row
from captioner.fitting.team import Team
from captioner.fitting.validation import Validation
from captioner.model.bundle import load

__all__ = ["FitTask", "take_part"]

_METRICS_S = 5.0  # seconds between two writes of metrics.jsonl: a store takes the file as a whole


@dataclass(frozen=True)
class FitTask:
    """What a worker is told; small, can be pickled."""

    output: FitOutput
    features: FeatureSet
    tokens: CaptionTokens
    training: TrainingConfig
    dtype: str
    device: str
    num_threads: int
    model_options: Mapping[str, Any] | None = None
    """What opens the stores of CLIP, LLaMA and the first weights; by default what opens the output's."""


def take_part(task: FitTask, device: str, on_row: Callable[[Row], None]) -> FitState:
    """Fit as one of this process's team and return the last state; `on_row` hears of each line of progress."""
    torch.set_num_threads(task.num_threads)
    device = task.device if task.device != "auto" else device
    model = load(
        task.output.start_url,
        dtype=_dtype(task.dtype, device),
        device=device,
        storage_options=dict(task.model_options or task.output.storage_options) or None,
    )
    team = Team.of_process_group()
    return fit_projector(
        model,
        task.tokens.load("train", task.features.features_of("train")),
        _validation(task),
        task.training,
        team=team,
        examples=task.features.fingerprint,
        saved=task.output.read("checkpoint.pt"),
        listener=_Keeper(task.output, on_row).listener if team.rank == 0 else Listener(),
    )


def _validation(task: FitTask) -> Validation | None:
    """Return what a fit is measured on; None where there are no validation images."""
    examples = task.features.measured(task.training)
    if not len(examples):
        return None
    scored = examples.captions[: task.training.num_scored_images]
    return Validation(task.tokens.load("validation", examples.features), scored)


@dataclass
class _Keeper:
    """Writes what a fit goes on from, and what a person looks at meanwhile."""

    output: FitOutput
    tell: Callable[[Row], None]
    _shown_at: float = -math.inf

    @property
    def listener(self) -> Listener:
        return Listener(self.show, self.keep)

    def show(self, state: FitState) -> None:
        """Tell of the last line, and show it to who looks into the run folder."""
        row = state.history[-1]
        self.tell(row)
        if monotonic() - self._shown_at >= _METRICS_S:
            self._write_metrics(state)
        if "val_loss" in row:
            self._write_curves(state)

    def keep(self, state: FitState, fit: ProjectorFit) -> None:
        """Write a state to go on from: last, since what it speaks of is there then."""
        self._write_metrics(state)
        self._write_curves(state)
        self.output.write("checkpoint.pt", state.to_bytes(fit))

    def _write_metrics(self, state: FitState) -> None:
        lines = "".join(json.dumps(row) + "\n" for row in state.history)
        self.output.write("metrics.jsonl", lines.encode())
        self._shown_at = monotonic()

    def _write_curves(self, state: FitState) -> None:
        self.output.write("curves.svg", curves_svg(state.history, f"Fit of {self.output.name}").encode())


def _dtype(name: str, device: str) -> str:
    """Return the format of the frozen weights; float16 is no choice, as its gradients vanish."""
    if name != "auto":
        return name
    has_bfloat16 = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if has_bfloat16 else "float32"
