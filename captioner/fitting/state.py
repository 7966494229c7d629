"""Everything that a fit needs to go on where it was cut, as one piece of bytes; no pickle is ever opened.

Nothing random is drawn after the first weights: the order of the examples follows from seed and step, so the step is
all the position there is, and the learning rate follows from it as well.
"""

import copy
import io
from dataclasses import dataclass, field
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from captioner.errors import JobError
from captioner.fitting.projector import ProjectorFit

__all__ = ["Best", "FitState"]

Row = dict[str, float]


@dataclass
class Best:
    """The best weights so far."""

    step: int
    figures: Row
    """What they reached on the validation split; empty where there is none."""

    captions: list[str]
    """Of the scored validation images, in their order."""

    weights: dict[str, Tensor]


@dataclass
class FitState:
    """Where a fit stands."""

    step: int = 0
    """Steps that are done."""

    examples: str = ""
    """Fingerprint of what is learned."""

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
        torch.save({**fields, "weights": weights_of(fit), "optimizer": fit.optimizer.state_dict()}, buffer)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, fit: ProjectorFit) -> "FitState":
        """Return the state that was saved, and put its weights and optimizer into `fit`."""
        fields = _loaded(data)
        fit.projector.load_state_dict(fields.pop("weights"))
        fit.optimizer.load_state_dict(fields.pop("optimizer"))
        best = fields.pop("best")
        return cls(**fields, best=Best(**best) if best else None)

    @classmethod
    def result(cls, data: bytes) -> "FitState":
        """Return the state that was saved, for a look at what came out."""
        fields = _loaded(data)
        best = fields["best"]
        kept = {
            name: fields[name] for name in ("step", "examples", "evaluations_without_gain", "is_stopped", "history")
        }
        return cls(**kept, best=Best(**best) if best else None)


def weights_of(fit: ProjectorFit) -> dict[str, Tensor]:
    """Return a copy of the projector's weights on the CPU."""
    return {name: copy.deepcopy(weight.detach().cpu()) for name, weight in fit.projector.state_dict().items()}


def _loaded(data: bytes) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, UnpicklingError) as error:
        first = str(error).partition("\n")[0]
        raise JobError(f"the checkpoint is damaged: {first}; remove _run/checkpoint.pt to begin anew") from error
    return fields
