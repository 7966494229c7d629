"""The state of a fit as bytes: everything that it needs to resume where it was interrupted. No pickle is ever opened.

After the initial weights nothing is random: the order of the examples and the learning rate follow from seed and step.
"""

import io
from dataclasses import dataclass, field
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from captioner.errors import JobError
from captioner.training.fit.projector import ProjectorFit
from captioner.training.fit.row import Row

__all__ = ["Best", "FitState", "best_of"]


@dataclass
class Best:
    """The best weights so far."""

    step: int
    figures: Row
    """Their figures on the validation split; empty without one."""

    captions: list[str]
    """Of the scored validation images, in their order."""

    weights: dict[str, Tensor]


@dataclass
class FitState:
    """The progress of a fit."""

    step: int = 0
    """Steps done."""

    examples: str = ""
    """Fingerprint of the examples."""

    best: Best | None = None
    evaluations_without_gain: int = 0
    is_stopped: bool = False
    """Whether it ended early."""

    history: list[Row] = field(default_factory=list)
    """One row every few steps: the lines of metrics.jsonl."""

    def to_bytes(self, fit: ProjectorFit) -> bytes:
        """Return this with the weights and the optimizer of `fit`."""
        buffer = io.BytesIO()
        fields = {**vars(self), "best": vars(self.best) if self.best else None}
        torch.save({**fields, "weights": fit.weights(), "optimizer": fit.optimizer.state_dict()}, buffer)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, fit: ProjectorFit) -> "FitState":
        """Return the state in a checkpoint, and load its weights and optimizer into `fit`."""
        fields = _loaded(data)
        fit.load(fields.pop("weights"))
        fit.optimizer.load_state_dict(fields.pop("optimizer"))
        best = fields.pop("best")
        return cls(**fields, best=Best(**best) if best else None)

    @classmethod
    def read(cls, data: bytes) -> "FitState":
        """Return the state in a checkpoint, without its weights and optimizer."""
        fields = _loaded(data)
        best = fields["best"]
        kept = {
            name: fields[name] for name in ("step", "examples", "evaluations_without_gain", "is_stopped", "history")
        }
        return cls(**kept, best=Best(**best) if best else None)


def best_of(state: FitState) -> Best:
    """Return the best weights of a fit that has ended."""
    assert state.best is not None, "a fit ends with an evaluation"
    return state.best


def _loaded(data: bytes) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, UnpicklingError) as error:
        first = str(error).partition("\n")[0]
        raise JobError(f"the checkpoint is damaged: {first}; remove _run/checkpoint.pt to start over") from error
    return fields
